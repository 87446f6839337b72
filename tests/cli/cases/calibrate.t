# tveval calibrate: input statistics in a store.
$ tvstore init s.tv -q; tveval calibrate $DATA/base --text $DATA/text/code.val.txt --text $DATA/text/prose.val.txt --context 65 --samples 20 --store s.tv
sums of squares of 17 inputs over 20 windows of 65 tokens, 39.0 KiB in s.tv
2> 20 of <n> windows of the text
2> <n> tokens per second
$ tveval calibrate $DATA/base --text $DATA/text/code.val.txt --text $DATA/text/prose.val.txt --context 65 --samples 20 --store s.tv
sums of squares of 17 inputs over 20 windows of 65 tokens, 39.0 KiB in s.tv
2> 20 of <n> windows of the text
2> 17 of them were there before
$ TV_STORE=s.tv tveval calibrate $DATA/base+$DATA/lora-jargon --text $DATA/text/jargon.val.txt --stat gram --samples 3 --json
{
  "schema": "tveval.calibrate/1",
  "model": "<*>/base+<*>/lora-jargon",
  "statistic": "gram",
  "samples": 3,
  "context": 256,
  "random": false,
  "texts": [
    {
      "file": "<*>/jargon.val.txt",
      "digest": "<x>"
    }
  ],
  "store": "s.tv",
  "key": "<x>",
  "tokens": 768,
  "n_inputs": 17,
  "n_resumed": 0,
  "n_computed": 17,
  "bytes": <n>
  "seconds": <n>
  "tokens_per_second": <n>
}
$ tvstore stat s.tv --json | grep n_stat; tvstore verify s.tv
  "n_statistics": 34,
2> s.tv: everything is as it was written
$ tvstore mask ls s.tv
SET<*>
$ tvstore gc s.tv --derived -q; tvstore stat s.tv --json | grep n_stat
  "n_statistics": 0,
# arrays for numpy: of the first weight that takes the input
$ tveval calibrate $DATA/base --random-tokens --samples 2 --context 16 --store s.tv -o d -q --json | grep n_comp; tveval calibrate $DATA/base --random-tokens --samples 2 --context 16 --store s.tv -o g --stat gram -q --json | grep n_comp; ls d | wc -l; for f in d g; do head -c 80 $f/model.layers.1.mlp.down_proj.weight.npy | tail -c 70; echo; done; python3 -c 'from array import array; r=lambda f,t: array(t,open(f+".npy","rb").read()[128:]); k="/model.layers.1.mlp.down_proj.weight"; d=r("d"+k,"d"); g=r("g"+k,"f"); n=len(d); print(n, len(g)==n*n, all(g[i*n+j]==g[j*n+i] for i in range(n) for j in range(i)), max(abs(g[i*n+i]/d[i]-1) for i in range(n))<1e-5, g[1]!=0, sum(r("g/model.embed_tokens.weight","d")))'
  "n_computed": 17,
  "n_computed": 17,
17
{'descr': '<f8', 'fortran_order': False, 'shape': (352,), }           
{'descr': '<f4', 'fortran_order': False, 'shape': (352, 352), }       
352 True True True True 32.0
# a model of the store itself; tokens at random are said to be so
$ tvstore import s.tv base $DATA/base -q; tveval calibrate store:base --store s.tv --random-tokens --samples 2 --context 16
sums of squares of 17 inputs over 2 windows of 16 tokens (random), 39.0 KiB in s.tv
2> tveval: warning: calibrating on random tokens: <*>
2> <n> tokens per second
$ for t in 1 2; do rm -rf t.tv; tvstore init t.tv -q; tveval calibrate store:base --store s.tv --random-tokens --random-seed 7 --samples 2 --context 16 -q -j $t --json | grep key > $t; done; cmp 1 2 && echo same; tveval calibrate store:base --store s.tv --random-tokens --random-seed 8 --samples 2 --context 16 -q --json | grep key > 3; cmp -s 1 3 || echo other
same
other
$ tveval calibrate $DATA/base --store s.tv
2> tveval: error: no text to calibrate on: add --text FILE
2> <*>hint: <*>--random-tokens describes no task
=> 2
$ tveval calibrate $DATA/base --text $DATA/text/code.val.txt
2> tveval: error: no store to keep the statistics in
2> <*>hint: <*>
=> 2
$ tveval calibrate $DATA/base --text a --random-tokens --store s.tv
2> tveval: error: --text, --ids and --random-tokens exclude each other
=> 2
$ tveval calibrate $DATA/base --text missing.txt --store s.tv
2> tveval: error: <*>missing.txt<*>
=> 4
$ : > empty.txt; tveval calibrate $DATA/base --text empty.txt --store s.tv
2> tveval: error: 0 tokens of text do not fill a window of 256
=> 4
$ tveval calibrate $DATA/base --text $DATA/text/code.val.txt --context 257 --store s.tv
2> tveval: error: <*>a context of 257 tokens, but the model has 256 positions
=> 4
$ tveval calibrate $DATA/base --text $DATA/text/code.val.txt --stat full --store s.tv
2> tveval: error: --stat: 'full' is neither diag nor gram
2> ...
=> 2
$ tveval calibrate $DATA/base --text $DATA/text/code.val.txt --store none.tv
2> tveval: error: no store at none.tv
2> <*>hint: <*>
=> 10
# A text that no method looks at is said to be of no use, but not where a recipe
# serves several methods; a wrong number hides no missing text.
$ printf 'merge_method: ties\nbase_model: %s/base\nmodels:\n- model: %s/ft-code\n  parameters: {weight: 1, density: 0.5}\n  calibration: {text: %s/text/code.val.txt}\n' $DATA $DATA $DATA > idle.yml
$ tvmerge plan idle.yml > plan
2> idle.yml:6:23: warning: the calibration text is not used: ties keeps by magnitude here; 'sparsify: importance' or 'sparsegpt' would look at the inputs of layers
$ sed 's/0.5/1/' idle.yml > all.yml; printf 'parameters: {sparsify: importance}\n' >> all.yml; tvmerge plan all.yml > plan
2> all.yml:6:23: warning: the calibration text is not used: no density below 1, so nothing is left out
$ sed 's/: ties/: dare_ties/' idle.yml > dare.yml; tvmerge run dare.yml dare -q
2> dare.yml:6:23: warning: the calibration text is not used: dare_ties looks at no inputs of layers; <*>, and regmean
$ head -c 2000 $DATA/text/code.val.txt > few.txt; printf 'parameters: {sparsify: importance}\n' >> idle.yml; tvmerge compare idle.yml -o cmp --text few.txt --context 64 --methods ties_magnitude,dare_ties -q > table
$ tvmerge compare idle.yml -o cmp2 --text ft-code=few.txt
2> tvmerge: error: no text to score with: add --text FILE (--text NAME=FILE calibrates that model)
=> 2
$ printf 'merge_method: ties\nbase_model: %s/base\nmodels:\n- model: %s/ft-code\n  parameters: {weight: 1, density: 0.5}\n  calibration: {text: gone.txt, samples: many, context: 1}\nparameters: {sparsify: importance}\n' $DATA $DATA > wrong.yml
$ tvmerge plan wrong.yml
2> wrong.yml:6:42: error: 'samples' must be a whole number from 1 to 16777216
2> wrong.yml:6:57: error: 'context' must be a whole number from 2 to 16777216
2> wrong.yml:6:23: error: calibration text of <*>: cannot open gone.txt: no such file or directory
2> tvmerge: error: 3 problems; nothing was written
=> 2
# refused before the work: the quota, then the memory
$ tvstore init q.tv --quota 800kB -q; tveval calibrate $DATA/base --text $DATA/text/code.val.txt --stat gram --samples 4 --store q.tv; tvstore stat q.tv --json | grep n_stat
  "n_statistics": 0,
2> 4 of <n> windows of the text
2> tveval: error: <*>missing to stay within its quota
2> <*>hint: <*>
$ tveval calibrate $DATA/base --text $DATA/text/code.val.txt --stat gram --samples 4 --store q.tv -q
2> ...
=> 5
$ tvstore quota q.tv 3MB -q > q; TV_CPU=avx512 tveval calibrate $DATA/base --text $DATA/text/code.val.txt --stat gram --samples 4 --store q.tv -q -j 1 --memory 500KiB
2> tveval: error: statistics of layer 0 <*> the memory budget is 512000
=> 5
$ tveval calibrate $DATA/base --text $DATA/text/code.val.txt --stat gram --samples 4 --store q.tv -q
X^T X of 17 inputs over <n> windows of 256 tokens, <*> in q.tv
