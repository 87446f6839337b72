# --device cuda on the tests' own driver (tests/support/fake_cuda.c): same
# bytes, a lost device, too little memory, going on. FAKE_CUDA is its folder.
$ printf 'merge_method: dare_ties\nbase_model: %s/base\nparameters: {density: 0.5}\nmodels:\n- model: %s/ft-prose\n  parameters: {weight: 0.5}\n- model: %s/ft-code\n  parameters: {weight: 0.5}\n' $DATA $DATA $DATA > r.yml
$ printf 'merge_method: ties\nbase_model: %s/base\nparameters: {density: 0.5}\nmodels:\n- model: %s/ft-prose\n  parameters: {weight: 1}\n- model: %s/ft-code\n  parameters: {weight: 1}\n' $DATA $DATA $DATA > ties.yml
$ tvmerge r.yml cpu -q --device cpu && tvmerge ties.yml cpu2 -q
$ printf 'export LD_LIBRARY_PATH=%s TV_CUDA_LEAST=0\nexec "$@"\n' $FAKE_CUDA > gpu
# Without a GPU: refused where one was asked for, silent where not.
$ export FAKE_CUDA_DEVICES=0; sh gpu tvmerge r.yml none -q --device cuda
2> tvmerge: error: --device cuda:0: the CUDA driver finds no GPU
2>   hint: --device cpu does all that is done there (matrix work within rounding)
=> 4
$ export FAKE_CUDA_DEVICES=0; test ! -e none && sh gpu tvmerge r.yml none -q --device auto && cmp none/model.safetensors cpu/model.safetensors
$ FAKE_CUDA_DEVICES=0 sh gpu tvmerge r.yml none2 --cuda 2>&1 | grep cuda
tvmerge: note: --cuda: no GPU is used (see --device); the CPU does the work
$ sh gpu tvmerge --version | tail -n 1
CUDA: Fake GPU 0 (compute 7.5, 64 MiB, driver 12.4)
$ FAKE_CUDA_DEVICES=0 sh gpu tvstore --version | tail -n 1
CUDA: none (the CUDA driver finds no GPU)
$ sh gpu tvmerge r.yml x -q --device cuda:1
2> tvmerge: error: --device cuda:1: there is no CUDA device 1: 1 found
2>   hint: --device cpu does all that is done there (matrix work within rounding)
=> 4
# Every operation on the device: the same bytes, whatever its memory.
$ sh gpu tvmerge r.yml gpu1 -v --device cuda 2>&1 | grep kernels
<n> threads, cuda kernels
$ cmp gpu1/model.safetensors cpu/model.safetensors && grep '"device"' gpu1/tvmerge.json
  "device": "cuda:0",
$ FAKE_CUDA_DEVICES=2 sh gpu tvmerge ties.yml gpu2 -q --device cuda:1 --device-memory 300k && cmp gpu2/model.safetensors cpu2/model.safetensors
$ FAKE_CUDA_MEMORY=600000 sh gpu tvmerge ties.yml gpu3 -q --device cuda --device-memory 1G && cmp gpu3/model.safetensors cpu2/model.safetensors
# What it pins is part of --memory.
$ sh gpu tvmerge ties.yml gpu3m -q --device cuda --memory 16MiB && cmp gpu3m/model.safetensors cpu2/model.safetensors
# By default the device gets what it is faster at: none of this.
$ FAKE_CUDA_LOSE=1 TV_CUDA_LEAST=65536 LD_LIBRARY_PATH=$FAKE_CUDA tvmerge ties.yml gpu4 -q --device cuda && cmp gpu4/model.safetensors cpu2/model.safetensors
# auto leaves element-wise work to the CPU.
$ FAKE_CUDA_LOSE=1 sh gpu tvmerge ties.yml gpu5 -q && cmp gpu5/model.safetensors cpu2/model.safetensors
# A lost device ends the merge; it goes on where it was, on its device.
$ FAKE_CUDA_LOSE=400 TV_GROUP_BYTES=1 sh gpu tvmerge ties.yml lost -q -j 1 --device cuda
2> tvmerge: error: CUDA device 0 (Fake GPU 0): cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (719)
2> ...
=> 1
$ test ! -e lost/config.json && tvmerge status lost
lost: unfinished, <*>
$ sh gpu tvmerge ties.yml lost -v 2>&1 | grep kernels
<n> threads, cuda kernels
$ cmp lost/model.safetensors cpu2/model.safetensors
# Or on the CPU, where the device is gone: these bytes do not depend on it.
$ FAKE_CUDA_LOSE=400 TV_GROUP_BYTES=1 sh gpu tvmerge ties.yml lost2 -q -j 1 --device cuda
2> tvmerge: error: CUDA device 0 <*>
2> ...
=> 1
$ tvmerge ties.yml lost2 -q && cmp lost2/model.safetensors cpu2/model.safetensors
# Not even the smallest tile fits: exit 5, and the state stays.
$ FAKE_CUDA_MEMORY=700 sh gpu tvmerge ties.yml small -q --device cuda --device-memory 1G
2> tvmerge: error: <*> needs <n> bytes of device memory, <*>
2> ...
=> 5
$ tvmerge ties.yml small -q --device cpu && cmp small/model.safetensors cpu2/model.safetensors
$ sh gpu tvmerge ties.yml small -q --device cuda --device-memory 100
# Statistics are sums in another order there: the device is part of the plan of
# what depends on them, and of nothing else.
$ printf 'merge_method: sparsegpt_ties\nbase_model: %s/base\nparameters: {density: 0.3, weight: 1}\nmodels:\n- model: %s/ft-code\n  calibration: {text: %s/text/code.calib.txt, samples: 1, context: 16}\n' $DATA $DATA $DATA > cal.yml
$ tvmerge cal.yml calc -q --device cpu && sh gpu tvmerge cal.yml calg -q --device cuda
$ grep -h -o '"device": "[^"]*' calc/tvmerge.json calg/tvmerge.json
"device": "cpu
"device": "cuda:0
"device": "Fake GPU 0
$ sh gpu tvmerge cal.yml calc -q --device cuda
2> tvmerge: error: calc holds the result of another merge: device was not set, is "Fake GPU 0"
2>   hint: --force replaces it, --accept-numerics takes it as it is
=> 4
$ tvmerge cal.yml calg -q --device cpu
2> tvmerge: error: calg holds the result of another merge: device was "Fake GPU 0", is not set
2>   hint: --force replaces it, --accept-numerics takes it as it is
=> 4
$ sh gpu tvmerge cal.yml calg 2>&1 | grep already && sh gpu tvmerge cal.yml calc --device cuda --accept-numerics 2>&1 | grep already
calg is complete already: nothing to do
calc is complete already: nothing to do
# auto: a GPU for models that are worth its start (TV_CUDA_LEAST=0: all), if it
# computes what it should and has room; else the CPU.
$ sh gpu tvmerge cal.yml auto1 -q && cmp auto1/model.safetensors calg/model.safetensors && grep '"device": "cuda' auto1/tvmerge.json
  "device": "cuda:0",
$ FAKE_CUDA_LOSE=1 LD_LIBRARY_PATH=$FAKE_CUDA tvmerge cal.yml auto2 -q && cmp auto2/model.safetensors calc/model.safetensors
$ FAKE_CUBLAS_WRONG=1 sh gpu tvmerge cal.yml auto3 -q --progress=none; cmp auto3/model.safetensors calc/model.safetensors
2> tvmerge: warning: the GPU is not used: CUDA device 0 (Fake GPU 0) does not compute what it should: a product gives <*>
$ FAKE_CUDA_MEMORY=9000000 sh gpu tvmerge cal.yml auto4 -q && cmp auto4/model.safetensors calc/model.safetensors
$ FAKE_CUDA_DEVICES=0 sh gpu tvmerge cal.yml auto5 -q && cmp auto5/model.safetensors calc/model.safetensors
# An unfinished one too, and in a store; auto keeps the device.
$ TV_GROUP_BYTES=1 FAKE_CUDA_LOSE=300 sh gpu tvmerge cal.yml half -q --device cuda -j 1
2> tvmerge: error: calibration: CUDA device 0 <*>
2> ...
=> 1
$ tvmerge cal.yml half -q
2> tvmerge: error: half holds an unfinished merge of another plan: device was "Fake GPU 0", is not set
2>   hint: run it where the earlier one ran, or with --accept-numerics: bytes may then differ in their last bits
=> 4
$ sh gpu tvmerge cal.yml half -q && cmp half/model.safetensors calg/model.safetensors
$ tvstore init s.tv -q; sh gpu tvmerge cal.yml --into x --store s.tv -q --device cuda
$ sh gpu tvmerge cal.yml --into x --store s.tv 2>&1 | grep -c already
1
$ sh gpu tvmerge cal.yml --into x --store s.tv -q --device cpu
2> tvmerge: error: store s.tv has an object 'x', the result of another merge: device was "Fake GPU 0", is not set
2>   hint: --force replaces it, --accept-numerics takes it as it is
=> 4
# Element-wise merges: the device is not in it.
$ sh gpu tvmerge ties.yml cpu2 --device cuda 2>&1 | grep -c already
1
# A comparison makes them on the device too, and stays on it.
$ head -c 700 $DATA/text/code.val.txt > few.txt; sh gpu tvmerge compare cal.yml -o cmp --methods sparsegpt_ties --context 32 --text few.txt --context 33 -q --device cuda > table && cmp cmp/ties_sparsegpt/model.safetensors calg/model.safetensors && grep -o '"device": "cuda' cmp/ties_sparsegpt/tvmerge.json
"device": "cuda
$ tvmerge compare cal.yml -o cmp --methods sparsegpt_ties --context 32 --text few.txt --context 33 -q
2> tvmerge: error: cmp: what .tvcompare holds of 'base0' was taken of other inputs, recipes, texts or settings, or on another device
2>   hint: give another OUT, or --force to begin again
=> 4
# Perplexity: all of it there, or linear layers alone where a batch has no room.
$ head -c 200 $DATA/text/prose.val.txt > few.txt; tveval ppl $DATA/base --context 32 --text few.txt --json -q --device cpu | grep -o '"ppl": [0-9]*\.[0-9]' > ppl.cpu
$ sh gpu tveval ppl $DATA/base --context 32 --text few.txt --json --progress=none --device cuda > ppl.json; grep -E 'device' ppl.json; grep -o '"ppl": [0-9]*\.[0-9]' ppl.json | cmp - ppl.cpu
  "device": "cuda:0",
  "on_device": "all"
$ sh gpu tveval ppl $DATA/base --context 32 --text few.txt --json --progress=none | grep -E 'device'
  "device": "cuda:0",
  "on_device": "all"
$ LD_LIBRARY_PATH=$FAKE_CUDA tveval ppl $DATA/base --context 32 --text few.txt --json --progress=none | grep -c device
0
=> 1
$ sh gpu tveval ppl $DATA/base --context 32 --text few.txt --json --progress=none --device cuda --device-memory 8M > ppl.json; grep -E 'on_device' ppl.json; grep -o '"ppl": [0-9]*\.[0-9]' ppl.json | cmp - ppl.cpu
  "on_device": "linear layers"
$ sh gpu tveval ppl $DATA/base --context 32 --text few.txt --progress=none --device cuda --device-memory 8M 2>&1 | grep note
tveval: note: only linear layers were computed on the device, the rest on the CPU: windows of 32 tokens need <n> bytes of device memory, <n> are there (--device-memory)
$ sh gpu tveval ppl $DATA/base --context 32 --text few.txt -q --device cuda --device-memory 4300k
2> tveval: error: few.txt: <*> needs <n> bytes of device memory, <*>
2> ...
=> 5
$ FAKE_CUDA_LOSE=60 sh gpu tveval ppl $DATA/base --context 32 --text few.txt -q --device cuda
2> tveval: error: few.txt: CUDA device 0 (Fake GPU 0): cuStreamSynchronize: CUDA_ERROR_LAUNCH_FAILED (719)
2> ...
=> 1
