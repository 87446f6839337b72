# tvmerge run: the short form, --into, repeating, mergekit's flags.
$ printf 'merge_method: task_arithmetic\nbase_model: %s/base\nmodels:\n- model: %s/ft-prose\n  parameters: {weight: 0.5}\n- model: %s/ft-code\n  parameters: {weight: 0.5}\n' $DATA $DATA $DATA > r.yml
$ tvmerge r.yml out
2> task_arithmetic of 3 inputs: 38 tensors (0 copied) -> out
2> reads 5.7 MiB, writes 1.9 MiB in 1 file
2> needs <*> of memory at most, <*> on disk
2> merged 38 tensors in <*>, <n> MB/s, peak memory <*>
2> digest <x>
2> result in out
$ test -f out/config.json && test ! -e out/.tvmerge
$ tvmerge run r.yml out
2> task_arithmetic of 3 inputs: <*>
2> ...
2> out is complete already: nothing to do
2> digest <x>
2> result in out
$ tvmerge status out
out: finished, 38 tensors, digest <x>
$ tvmerge status out --json
{
  "schema": "tvmerge.status/1",
  "state": "finished",
  "n_done": 38,
  "n_tensors": 38,
  "bytes_done": 2001152,
  "bytes_total": 2001152,
  "running": false,
  "plan_hash": "<x>",
  "digest": "<x>",
  "calibration": null,
  "documents": []
}
$ tvmerge --random-seed 3 r.yml out -q
2> tvmerge: error: <*>seed<*>
2>   hint: --force replaces it
=> 4
$ tvmerge --random-seed 3 r.yml out -q --force
$ tvstore init s -q && TV_STORE=s tvmerge run r.yml --into merged -q
$ tvstore ls s -q && tvstore diff s store:merged out
merged
38 tensors, all equal
$ printf 'merge_method: linear\nmodels:\n- {model: store:merged, parameters: {weight: 1}}\n' > linear.yml
$ tvmerge linear.yml out2 --store s -q && tvstore diff s out2 out
38 tensors, all equal
$ tvmerge --cuda --lazy-unpickle --lora-merge-cache c --low-cpu-memory r.yml out3 --copy-tokenizer --write-model-card -j 1
2> tvmerge: note: --lazy-unpickle, --lora-merge-cache, --low-cpu-memory: no effect here; <*>
2> tvmerge: note: --cuda: <*>
2> ...
2> result in out3
$ tvmerge r.yml out3b -q --transformers-cache c --read-to-gpu --multi-gpu --gpu-rich --no-async-write --write-threads 2 --clone-tensors --safe-serialization --num-threads 2 --lora-merge-dtype torch.float32 --no-cuda --no-quiet && tvstore diff s out3b out
38 tensors, all equal
$ tvmerge r.yml out0 -q --no-copy-tokenizer --no-write-model-card --out-shard-size 0 && ls out0
config.json
generation_config.json
mergekit_config.yml
model.safetensors
tvmerge.json
tvmerge_config.yml
$ tvmerge r.yml out4 -q --no-copy-tokenizer --no-write-model-card --out-shard-size 1MB && ls out4
config.json
generation_config.json
mergekit_config.yml
model-00001-of-00003.safetensors
model-00002-of-00003.safetensors
model-00003-of-00003.safetensors
model.safetensors.index.json
tvmerge.json
tvmerge_config.yml
$ tvmerge r.yml out5 --trust-remote-code
2> tvmerge: error: --trust-remote-code: no code that comes with a model is run
2> ...
=> 2
$ tvmerge r.yml out5 --no-safe-serialization
2> tvmerge: error: --no-safe-serialization: only safetensors are written
2> ...
=> 2
$ tvmerge r.yml out5 --lora-merge-dtype bf16
2> tvmerge: error: --lora-merge-dtype: 'bf16' is not float16, bfloat16 or float32
2> ...
=> 2
$ tvmerge r.yml out5 --allow-crimes
2> tvmerge: error: --allow-crimes: <*>
2> ...
=> 2
# The usual command line of mergekit: both at once, and what to do.
$ tvmerge r.yml out5 --cuda --allow-crimes --lazy-unpickle --copy-tokenizer --trust-remote-code --out-shard-size 1B --low-cpu-memory --write-model-card
2> tvmerge: error: --allow-crimes: what does not fit together is refused ('tokenizer:' joins vocabularies, 'override_architecture:' takes one class for another); --trust-remote-code: no code that comes with a model is run
2>   hint: leave them out: nothing needs them here
=> 2
$ tvmerge r.yml out5c --cuda --no-allow-crimes --lazy-unpickle --copy-tokenizer --no-trust-remote-code --out-shard-size 1B --low-cpu-memory --write-model-card -q && tvstore diff s out5c out
38 tensors, all equal
$ tvmerge r.yml out5 --compat other
2> tvmerge: error: --compat: 'other' is not one of mergekit, peft
2> ...
=> 2
$ tvmerge r.yml out5 --device cuda:77
2> tvmerge: error: --device cuda:77: <*>
2> ...
=> 4
$ test ! -e out5
$ tvmerge r.yml
2> tvmerge: error: OUT is missing
2>   hint: usage: tvmerge run RECIPE OUT, or RECIPE --into NAME --store STORE
=> 2
$ tvmerge r.yml out5 --into x --store s
2> tvmerge: error: OUT and --into exclude each other
=> 2
$ tvmerge run r.yml --into x
2> tvmerge: error: --into needs --store STORE (or TV_STORE)
=> 2
$ tvmerge run r.yml --into x --store nostore
2> tvmerge: error: <*>nostore<*>
2> ...
=> 10
$ tvmerge status nothing
2> tvmerge: error: nothing holds no merge
=> 10
# More donors than fit into the memory at once are measured in turns. Those of
# weight 0 change nothing.
$ two() { printf 'merge_method: ties\nbase_model: %s/base\nparameters: {density: 0.3, normalize: false, rescale: true}\nmodels:\n- {model: %s/ft-prose, parameters: {weight: 0.5}}\n' $DATA $DATA; }; last() { printf -- '- {model: %s/ft-code, parameters: {weight: 0.7}}\n' $DATA; }; (two; last) > two.yml; (two; for i in $(seq 70); do ln -s $DATA/ft-prose m$i; printf -- '- {model: ./m%s, parameters: {weight: 0}}\n' $i; done; last) > many.yml
$ tvmerge two.yml two -q && tvmerge many.yml many -q --memory 16MiB && tvstore diff s two many
38 tensors, all equal
# The card of a merge names the commit of a hub model, not its branch.
$ C=0123456789abcdef0123456789abcdef01234567; H=hf/hub/models--o--n; mkdir -p $H/snapshots $H/refs && cp -rL $DATA/base $H/snapshots/$C && printf $C > $H/refs/main && printf 'merge_method: linear\nmodels:\n- {model: o/n, parameters: {weight: 1}}\n' > hub.yml && HF_HOME=$PWD/hf tvmerge hub.yml hub -q && grep 'revision' hub/README.md
- `o/n`, revision `0123456789abcdef0123456789abcdef01234567`, <*>
