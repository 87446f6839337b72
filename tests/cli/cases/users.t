# What a new user runs into.
$ ln -s $DATA/base base && ln -s $DATA/ft-code ft-code && ln -s $DATA/lora-jargon lora && ln -s $DATA/text text
$ printf 'merge_method: linear\nmodels:\n- {model: ft-code, parameters: {weight: 1}}\n- {model: base, parameters: {weight: 1}}\n' > recipe.yml
# The words that a choice takes.
$ tvmerge methods ties | grep '^sparsify'
sparsify <*> none, magnitude, random, importance, sparsegpt <*>
# OUT is a link that leads nowhere.
$ ln -s gone link && tvmerge run recipe.yml link -q
2> tvmerge: error: link is a symbolic link that leads nowhere
=> 4
$ tvmerge plan recipe.yml link -q > /dev/null
2> tvmerge: error: link is a symbolic link that leads nowhere
=> 4
$ ln -s loop loop && tvmerge plan recipe.yml loop -q > /dev/null
2> tvmerge: error: loop is a symbolic link that leads nowhere
=> 4
$ sed 's/ft-code/.\/link/' recipe.yml > linked.yml && tvmerge plan linked.yml
2> linked.yml:3:11: error: model './link' not found: it is a symbolic link that leads nowhere
=> 4
# Shards: without an index, with one of another model, beside a whole model.
$ tvstore init s -q && tvstore import s base base -q && tvstore export s base shards --out-shard-size 500KB -q && cp -r shards bare && rm bare/model.safetensors.index.json
$ sed 's/ft-code/bare/' recipe.yml > bare.yml && tvmerge plan bare.yml
2> bare.yml:3:11: error: bare: no model here (looked for <*>) (model-<*>.safetensors is there, but no model.safetensors.index.json, which says what is in it)
=> 4
$ cp -r base/. stale && cp shards/model.safetensors.index.json stale && sed 's/ft-code/stale/' recipe.yml > stale.yml && tvmerge plan stale.yml
2> stale.yml:3:11: error: stale: the shard model-00001-of-<*>.safetensors that the index names is missing (model.safetensors is there too: if the index is of an older model, remove it)
=> 4
$ cp -r shards both && cp base/model.safetensors both && sed 's/ft-code/both/' recipe.yml > both.yml && tvmerge plan both.yml -q > /dev/null
2> both.yml:3:11: warning: 'both' holds model.safetensors and model.safetensors.index.json: what the index names is read; transformers would load the other
# Bounds as they are.
$ tvmerge run recipe.yml out --threads -3
2> tvmerge: error: --threads: '-3' is not a number from 1 to 1024
2> ...
=> 2
$ tvmerge run recipe.yml out --threads 0
2> tvmerge: error: --threads: '0' is not a number from 1 to 1024
2> ...
=> 2
# Usage of a command of several forms is one line.
$ tvstore mask ls
2> tvstore: error: an argument is missing
2>   hint: usage: tvstore mask [OPTION...] ls STORE, or info STORE [SET], or overlap STORE [SET [SET]]
=> 2
# Methods that only adapters have.
$ printf 'merge_method: svd\nbase_model: base\nmodels: [{model: lora, parameters: {weight: 1}}]\n' > svd.yml && tvmerge plan svd.yml
2> svd.yml:1:15: error: merge_method 'svd' merges adapters into an adapter: add 'output: adapter', and name adapters alone
2> ...
=> 2
$ printf 'merge_method: svd\nmodels: [{model: lora, parameters: {weight: 1}}]\n' > svd2.yml && tvmerge plan svd2.yml | grep disk
peak disk      <*>
$ tvmerge compare svd2.yml -o cmp --text text/code.val.txt
2> tvmerge: error: svd2.yml gives an adapter, and compare scores models
2>   hint: 'tvmerge run' merges it, 'tveval ppl BASE+OUT' scores it
=> 4
# Logits in a document's place would be no document; what is no file stays.
$ tveval logits base --ids ids.npy --json
2> {"error": {"code": "usage", "message": "with --json the logits need a file: add -o OUT.npy"<*>
=> 2
# What a text is scored with, and whether it can be, before the first is.
$ tveval ppl base --text text/code.val.txt --protocol stride --context 128 -q | tail -n 1
protocol stride, context 128, stride 64, BOS <*>
$ tveval ppl base --text text/code.val.txt --protocol stride --context 128 --json | grep '"stride": 64'
<*>"stride": 64<*>
$ tveval ppl base --text text/code.val.txt --stride 64 -q > /dev/null
2> tveval: warning: --stride changes protocol stride only, not windows
$ echo short > short.txt && tveval ppl base --text text/code.val.txt --text short.txt
2> tveval: error: short.txt: the text has <n> tokens, too few for one window of 255
2> ...
=> 4
$ tveval ppl base --text short.txt --tokenizer base/config.json
2> tveval: error: base/config.json: <*>
=> 12
$ tveval tokenize base/tokenizer.json --text short.txt
<*>
# A value for some tensors only; a word of tokenizer_source.
$ printf 'merge_method: linear\nmodels:\n- {model: base, parameters: {weight: [{filter: mlp, value: 1}]}}\n' > filter.yml && tvmerge plan filter.yml
2> filter.yml:3:11: error: missing required parameter 'weight' for 'base' (first needed for model.embed_tokens.weight; no filter matches it: add an entry without one, {value: ...})
=> 2
$ (cat recipe.yml && echo 'tokenizer_source: unoin') > unoin.yml && tvmerge plan unoin.yml
2> unoin.yml:5:19: error: model 'unoin' not found: <*> (did you mean 'union'?)
=> 4
# A recipe elsewhere; its paths are those of the current directory.
$ mkdir sub && ln -s $DATA/ft-prose sub/prose && sed 's/ft-code/prose/' recipe.yml > sub/r.yml && tvmerge plan sub/r.yml
2> sub/r.yml:3:11: error: model 'prose' not found: <*> (paths are relative to the current directory, not to the recipe: 'sub/prose' is there)
=> 4
# Arrays do not go into a store; adapters of an export are objects or paths.
$ tveval calibrate base --text text/code.calib.txt --samples 2 --store s -o s -q
2> tveval: error: s is a store
2> ...
=> 4
$ ls s | grep -c npy
0
=> 1
$ tvstore import s lora lora -q && tvstore export s base+loar out9
2> tvstore: error: store s has no object 'loar'
2>   hint: did you mean 'lora'?
=> 4
$ tvstore export s base+./lora out9 -q && tvstore export s base+lora out10 -q && cmp out9/model.safetensors out10/model.safetensors
# A damaged adapter is what is wrong, not the method that merges it.
$ cp -r $DATA/lora-jargon cut && truncate -s 5000 cut/adapter_model.safetensors && printf 'merge_method: cat\nmodels: [{model: cut, parameters: {weight: 1}}]\n' > cut.yml && tvmerge plan cut.yml
2> cut.yml:2:18: error: cut/adapter_model.safetensors: header length <*>
=> 12
$ cp -r $DATA/lora-jargon bare2 && rm bare2/adapter_config.json && sed 's/cut/bare2/' cut.yml > bare2.yml && tvmerge plan bare2.yml
2> bare2.yml:2:18: error: bare2: no model here (looked for <*>) (adapter_model.safetensors is there, but no adapter_config.json, which says what is in it)
=> 4
$ sed 's/cut/lroa/' cut.yml > typo.yml && tvmerge plan typo.yml
2> typo.yml:2:18: error: model 'lroa' not found: <*> (did you mean 'lora'?)
=> 4
$ cp -r base/. broken && echo '{' > broken/tokenizer.json && tveval ppl broken --text text/code.val.txt
2> tveval: error: broken: tokenizer.json<*>
=> 12
