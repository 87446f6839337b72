# tvstore mask, gc --derived, compact: what merges have kept in a store.
$ tvstore init s
2> created store s (quota: none)
$ tvstore mask ls s
SET  DONOR  BASE  DENSITY  TENSORS  WEIGHTS  SIZE  BITS/WEIGHT  TASK VECTORS
$ tvstore mask info s
2> tvstore: error: no masks in store s
2> <*>tvstore mask ls s<*>
=> 10
$ for m in base ft-prose ft-code; do tvstore import s $m $DATA/$m --link -q; done
$ printf 'merge_method: ties\nbase_model: store:base\nmodels:\n- model: store:ft-prose\n  parameters: {weight: 0.5, density: 0.2}\n- model: store:ft-code\n  parameters: {weight: 0.3, density: 0.2}\n' > r.yml
$ tvmerge run r.yml a --store s
2> ...
2> cache: 0 masks used, 76 stored; 0 task vectors used, 0 stored
2> digest <x>
2> result in a
$ tvmerge run r.yml b --store s
2> ...
2> cache: 76 masks used, 0 stored; 0 task vectors used, 76 stored
2> digest <x>
2> result in b
$ tvmerge run r.yml c --store s --no-cache -q
$ cmp a/model.safetensors b/model.safetensors && cmp a/model.safetensors c/model.safetensors
$ tvstore mask ls s -q | wc -l | tr -d ' '
2
$ tvstore mask info s store:ft-code | head -n 2
NAME                                            WEIGHTS   KEPT  DENSITY  BYTES  BITS/WEIGHT  TASK VECTOR
model.embed_tokens.weight                        262144  52428   0.2000  32840        1.002       <n>
$ tvstore mask overlap s
A         B         TENSORS    BOTH   EITHER  JACCARD
<x>  <x>       38  88,252  311,942   0.2829
$ tvstore mask info s
2> tvstore: error: 2 sets of masks: name one by its number
2> <*>
=> 2
$ tvstore mask lst s
2> tvstore: error: mask: 'lst' is not known; ls, info and overlap are
2> <*>did you mean 'ls'?<*>
=> 2
$ tvstore gc s --derived
2> freed <*> inside the store
$ tvstore mask ls s -q
$ tvstore compact s
2> the store took <*>, it now takes <*>
$ tvstore compact s --scratch s
2> <*>--scratch s is the store itself<*>
=> 2
$ tvstore verify s -q
