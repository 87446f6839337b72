# tvmerge plan: rows, totals, problems; nothing is written.
$ printf 'merge_method: ties\nbase_model: %s/base\nmodels:\n- model: %s/ft-prose\n  parameters: {weight: 0.5, density: 0.2}\n- model: %s/ft-code\n  parameters: {weight: 0.3}\n' $DATA $DATA $DATA > r.yml
$ tvmerge plan r.yml out
TENSORS    BYTES  METHOD  DTYPE  INPUTS <*>
     38  1.9 MiB  ties    BF16   <*>/ft-prose, <*>/ft-code, <*>/base (base)  weight=0.5,0.3 density=0.2,1 normalize=true rescale=false lambda=1 int8_mask=false <*>
<>
method         ties
input          <*>/ft-prose (fingerprint <x>)
...
tensors        38
reads          5.7 MiB
writes         1.9 MiB in 1 file
peak memory    <*>
peak disk      <*>
side files     <*>
...
               config.json from <*>/base
$ ls
r.yml
$ tvmerge plan r.yml --json | head -n 4
{
  "schema": "tvmerge.plan/1",
  "ok": true,
  "problems": [],
$ printf 'merge_method: tise\nmodels: []\n' > bad.yml
$ tvmerge plan bad.yml
2> bad.yml:1:15: error: <*>tise<*>ties<*>
2> ...
=> 2
$ printf 'merge_method: ties\nbase_model: nope1\nmodels:\n- model: nope2\n  parameters: {weight: 1}\n' > missing.yml
$ tvmerge plan missing.yml
2> missing.yml:<*>: error: <*>nope<*>
2> missing.yml:<*>: error: <*>nope<*>
2> tvmerge: error: 2 problems; nothing was written
=> 4
$ tvmerge plan missing.yml --json -q 2>err | head -n 5; grep -c '^{"error": {"code": "input", .*"problems": \[' err
{
  "schema": "tvmerge.plan/1",
  "ok": false,
  "problems": [
    {
1
# Mistakes in the recipe hide nothing else, and run lists the same.
$ printf 'merge_method: linaer\nmodels:\n- {model: ./nope, parameters: {weight: abc}}\n- model: %s/base\n' $DATA > many.yml
$ tvmerge plan many.yml
2> many.yml:1:15: error: unknown merge_method 'linaer'; did you mean 'linear'?
2> many.yml:3:40: error: parameter 'weight': 'abc' is not a number
2> many.yml:3:11: error: <*>nope<*>
2> tvmerge: error: 3 problems; nothing was written
=> 2
$ tvmerge run many.yml out5
2> ...
2> tvmerge: error: 3 problems; nothing was written
=> 2
# A store object that a recipe names is an input like any other.
$ tvstore init s -q; printf 'merge_method: linear\nmodels:\n- {model: store:nobody, parameters: {weight: 1}}\n' > object.yml
$ tvmerge plan object.yml --store s
2> object.yml:3:11: error: <*>nobody<*>
=> 4
# What belongs elsewhere is ignored with a warning.
$ printf 'merge_method: linear\nmodels:\n- {model: %s/base, layer_range: [0, 1], parameters: {weight: 1}}\n' $DATA > range.yml
$ tvmerge plan range.yml > /dev/null
2> range.yml:3:<n>: warning: layer_range is ignored here; it belongs to the sources of 'slices:'
# How DARE rescales is told where a merge is planned only.
$ printf 'merge_method: dare_ties\nbase_model: %s/base\nmodels:\n- {model: %s/ft-prose, parameters: {weight: 1, density: 0.3}}\n' $DATA $DATA > dare.yml
$ tvmerge plan dare.yml > /dev/null
2> tvmerge: note: rescale divides by density, <*>
$ tvmerge plan dare.yml --json | grep -c '"rescale divides\|: "rescale divides'
1
$ tvmerge run dare.yml dare -q
# The refusal names what has changed.
$ sed -i s/0.3/0.4/ dare.yml && tvmerge run dare.yml dare -q
2> tvmerge: error: <*>models[ft-prose].parameters.density was 0.3, is 0.4
2>   hint: --force replaces it
=> 4
# The wrong way round; a store in place of OUT.
$ mkdir dir && tvmerge run dir dare.yml
2> tvmerge: error: dir is a directory, no recipe
2>   hint: the recipe comes first, then where the result goes: RECIPE OUT
=> 4
$ tvmerge run dare.yml s -q
2> tvmerge: error: s is a store
2>   hint: '--into NAME --store s' in place of OUT merges into an object of it
=> 4
$ tvmerge plan dare.yml store:dare
2> ...
2> tvmerge: error: 'store:dare' names an object of a store, no directory ('tvmerge run --into dare --store STORE' merges into a store; './store:dare' is a directory)
=> 4
$ tvmerge run dare.yml store:dare -q; ls -d store:dare
2> tvmerge: error: 'store:dare' names an object of a store, no directory
2> ...
=> 2
# An option that reads the contents of inputs does not say that they changed.
$ tvmerge run dare.yml verified -q && tvmerge run dare.yml verified -q --verify-inputs
2> tvmerge: error: verified holds the result of another merge: verify_inputs was not set, is true
2>   hint: --force replaces it
=> 4
# mergekit takes any density; what it makes of it can be written.
$ sed 's/density: 0.4/density: [1.2, -1]/' dare.yml > beyond.yml && tvmerge plan beyond.yml
2> beyond.yml:4:<n>: error: parameter 'density': 1.2 is not between 0 and 1; mergekit takes it as 1: write that
2> beyond.yml:4:<n>: error: parameter 'density': -1 is not between 0 and 1; mergekit takes it as 0: write that
2> tvmerge: error: 2 problems; nothing was written
=> 2
# OUT in an input.
$ cp -r $DATA/base in && printf 'merge_method: linear\nmodels:\n- {model: ./in, parameters: {weight: 1}}\n' > in.yml
$ tvmerge run in.yml in --force
2> tvmerge: error: OUT 'in' is the directory of the input './in'
=> 4
$ tvstore init l.tv -q && tvstore import l.tv in in --link -q && printf 'merge_method: linear\nmodels:\n- {model: store:in, parameters: {weight: 1}}\n' > link.yml
$ tvmerge run link.yml in --store l.tv --force; tvstore verify l.tv -q && rm -r l.tv
2> tvmerge: error: OUT 'in': in/model.safetensors belongs to a linked object of the store l.tv and is not replaced
$ cp -r $DATA/lora-jargon lora && printf 'merge_method: svd\nmodels:\n- {model: ./lora, parameters: {weight: 1}}\n' > lora.yml && tvmerge run lora.yml lora --force; cmp lora/adapter_model.safetensors $DATA/lora-jargon/adapter_model.safetensors && rm -r lora
2> tvmerge: error: OUT 'lora' is the directory of the input './lora'
$ tvmerge extract-lora --model in --base $DATA/base --rank 1 in --force; ls in | grep -c adapter
0
2> tvmerge: error: OUT 'in' is the directory of the input 'in'
=> 1
$ tvmerge run in.yml in/sub
2> tvmerge: error: OUT 'in/sub' lies inside the input './in'
=> 4
$ tvmerge run in.yml . --force
2> tvmerge: error: OUT '.' holds the input './in'
=> 4
$ tvmerge run in.yml out6 --random-seed 9223372036854775808
2> tvmerge: error: --random-seed: '9223372036854775808' is not a number from 0 to 9223372036854775807
2> ...
=> 2
# A method that does not exist is one problem, with mergekit's arithmetic too.
$ printf 'merge_method: cat\nmodels:\n- model: %s/base\n' $DATA > cat.yml
$ tvmerge plan cat.yml --compat mergekit
2> cat.yml:1:15: error: merge_method 'cat' merges adapters into an adapter: <*>
=> 2
# Facts are notes: with a note's severity in the document too, not with -q.
$ printf 'merge_method: linear\nmodels:\n- {model: %s/base, parameters: {weight: 1}}\n- {model: %s/ft-code, parameters: {weight: 1}}\ntokenizer: {source: union}\n' $DATA $DATA > union.yml
$ tvmerge plan union.yml > /dev/null
2> <*>: warning: <*> has no tokenizer; it is taken to be that of <*>
2> vocabulary: note: <*> 0 added
2> vocabulary: note: <*> 0 of padding
$ tvmerge plan union.yml -q > /dev/null
2> <*>: warning: <*> has no tokenizer; it is taken to be that of <*>
$ tvmerge plan union.yml --json | grep -c '"note": true\|"note":true'
2
# A mistyped method is one mistake: what it would need is not asked for.
$ printf 'merge_method: tiess\nbase_model: %s/base\nmodels: [{model: %s/ft-code}, {model: %s/ft-prose}]\nparameters: {densty: 1}\n' $DATA $DATA $DATA > typo.yml && tvmerge plan typo.yml
2> typo.yml:1:15: error: unknown merge_method 'tiess'; did you mean 'ties'?
=> 2
