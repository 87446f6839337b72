# What is mistyped and has a near relative is named: paths, models, objects,
# tensors, words of options.
$ ln -s $DATA/base base && ln -s $DATA/ft-code ft-code && ln -s $DATA/lora-jargon lora && ln -s $DATA/text text && mkdir deep && ln -s $DATA/base deep/model
$ printf 'merge_method: linear\nmodels:\n- {model: ft-cod, parameters: {weight: 1}}\n- {model: base, parameters: {weight: 1}}\n' > recipe.yml
$ tvmerge plan recipe.yml
2> recipe.yml:3:11: error: model 'ft-cod' not found: no such path, and not in the Hugging Face cache <*> (did you mean 'ft-code'?)
=> 4
$ sed 's/ft-cod/base+loar/' recipe.yml > adapter.yml && tvmerge plan adapter.yml
2> adapter.yml:3:11: error: adapter 'loar' of 'base+loar' not found: <*> (did you mean 'lora'?)
=> 4
$ sed 's/ft-cod/dep\/model/' recipe.yml > deep.yml && tvmerge plan deep.yml
2> deep.yml:3:11: error: model 'dep/model' not found: <*> (did you mean 'deep/model'?)
=> 4
$ sed 's/ft-cod/nobody\/here/' recipe.yml > hub.yml && tvmerge plan hub.yml
2> hub.yml:3:11: error: model 'nobody/here' not found: <*> (hf download nobody/here)
=> 4
# A model of the cache that is there under a like name.
$ mkdir -p hub/models--org--thing/snapshots/0 hub/models--org--thing/refs && sed 's/ft-cod/org\/thnig/' recipe.yml > cached.yml && HF_HUB_CACHE=$PWD/hub tvmerge plan cached.yml
2> cached.yml:3:11: error: model 'org/thnig' not found: <*> (did you mean 'org/thing'?)
=> 4
# The name of another document.
$ printf 'name: halfway\nmerge_method: linear\nmodels: [{model: base, parameters: {weight: 1}}]\n---\nmerge_method: linear\nmodels: [{model: halfwya, parameters: {weight: 1}}]\n' > two.yml && tvmerge plan two.yml
2> <*>
2> two.yml:6:18: error: <*> (did you mean 'halfway', the result of another document?)
=> 4
$ tvmerge plan recpie.yml
2> tvmerge: error: cannot open recpie.yml: no such file or directory
2>   hint: did you mean 'recipe.yml'?
=> 4
$ tveval tokenize bsae --text text/code.val.txt
2> tveval: error: model 'bsae' not found: <*>
2>   hint: did you mean 'base'?
=> 4
$ tveval tokenize base --text text/code.vla.txt
2> tveval: error: cannot open text/code.vla.txt: no such file or directory
2>   hint: did you mean 'text/code.val.txt'?
=> 4
$ tvstore init store -q && tvstore import store base base -q
$ tvstore ls stroe
2> tvstore: error: no store at stroe
2>   hint: did you mean 'store'?
=> 10
$ tvstore ls bas
2> tvstore: error: no store at bas
2>   hint: create one with: tvstore init bas
=> 10
$ tvstore import store x ft-cdoe
2> tvstore: error: model 'ft-cdoe' not found: <*>
2>   hint: did you mean 'ft-code'?
=> 4
$ tvstore info store base/model.nrom.weight
2> tvstore: error: base has no tensor 'model.nrom.weight'
2>   hint: did you mean 'model.norm.weight'?
=> 10
$ tvstore cat store base/model.norm.weigth
2> tvstore: error: base has no tensor 'model.norm.weigth'
2>   hint: did you mean 'model.norm.weight'?
=> 10
$ tvstore cat store base/nothing.like.it
2> tvstore: error: base has no tensor 'nothing.like.it'
2>   hint: 'tvstore ls store base' lists its tensors
=> 10
$ tvstore cat store base/model.norm.weight --format nyp
2> tvstore: error: --format: 'nyp' is not one of text, raw, npy
2>   hint: did you mean 'npy'?
=> 2
$ tveval ppl base --text text/code.val.txt --protocol gpqt
2> tveval: error: --protocol: 'gpqt' is not one of windows, gptq, llamacpp, stride
2>   hint: did you mean 'gptq'?
=> 2
$ tvmerge compare recipe.yml -o out --text text/code.val.txt --keep bset
2> tvmerge: error: --keep: 'bset' is not one of all, best, none
2>   hint: did you mean 'best'?
=> 2
$ tvmerge extract-lora --model ft-code --base base --rank 1 out --svd ful
2> tvmerge: error: --svd: 'ful' is not one of auto, full, randomized
2>   hint: did you mean 'full'?
=> 2
$ tvstore ls store --color alwyas
2> tvstore: error: --color: 'alwyas' is not one of auto, always, never
2>   hint: did you mean 'always'?
=> 2
$ tvmerge run recipe.yml out --compat mergkit
2> tvmerge: error: --compat: 'mergkit' is not one of mergekit, peft
2>   hint: did you mean 'mergekit'?
=> 2
$ tvmerge run recipe.yml merged --into x --store store > /dev/null
2> tvmerge: error: <*>
2> ...
=> 2
$ mkdir outdir && sed 's/ft-cod/ft-code/' recipe.yml > good.yml && tvmerge run good.yml merged -q && tvmerge status mergde
2> tvmerge: error: mergde holds no merge
2>   hint: did you mean 'merged'?
=> 10
# What is no store, and what it is.
$ tvstore ls base
2> tvstore: error: no store at base
2>   hint: base is a model: 'tvstore import STORE NAME base' puts it into a store
=> 10
$ tvstore ls lora
2> tvstore: error: no store at lora
2>   hint: lora is a model: <*>
=> 10
$ tvstore ls text
2> tvstore: error: no store at text
2>   hint: text holds other files; 'tvstore init' makes a store in a new directory
=> 10
$ tvstore ls recipe.yml
2> tvstore: error: no store at recipe.yml
2>   hint: a store is a directory, recipe.yml is none
=> 10
$ mkdir empty && tvstore ls empty
2> tvstore: error: no store at empty
2>   hint: create one with: tvstore init empty
=> 10
# No quota has two names, everywhere.
$ tvstore init q --quota none && tvstore quota q && tvmerge plan good.yml --quota 0 -q > /dev/null && tvmerge plan good.yml --quota none -q > /dev/null
quota none, used <*>
2> created store q (quota: none)
$ tvstore init q2 --quota nune
2> tvstore: error: --quota: 'nune' is not a size
2>   hint: sizes look like 18GB, 1.5GiB or 4096; none (or 0) is no limit
=> 2
$ for c in 'tvmerge run' 'tvmerge compare' 'tvstore init'; do $c --help | tr -s ' \n' ' ' | grep -c 'default, 0 and none: no limit'; done
1
1
1
