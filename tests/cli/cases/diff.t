# tvstore diff: references, adapters, exit code 3.
$ tvstore init s -q && tvstore import s base $DATA/base -q && tvstore import s lora $DATA/lora-jargon -q
$ tvstore diff s store:base $DATA/base
38 tensors, all equal
$ tvstore diff s store:base $DATA/ft-prose
TENSOR                                          STATUS       MAX ABS  REL FROBENIUS       COSINE  DIFFERING
model.embed_tokens.weight                       different   0.119141       0.386028  0.962625995    260,304
...
38 of 38 tensors differ
=> 3
$ tvstore diff s store:base store:base+store:lora | tail -n 1
28 of 38 tensors differ
# An adapter on one side equals the merge that applies it, bit for bit.
$ printf 'merge_method: passthrough\nmodels:\n- model: %s/base+%s/lora-jargon\n' $DATA $DATA > r.yml
$ tvmerge r.yml merged -q
$ tvstore diff s merged store:base+store:lora
38 tensors, all equal
$ tvstore diff s store:base store:base+store:lora*0
38 tensors, all equal
$ tvstore diff s store:base store:lora | head -n 4
TENSOR <*>
base_model.model.model.layers.0.mlp.down_proj.lora_A.weight <*> only-b <*>
...
$ tvstore diff s store:base ./nothing
2> tvstore: error: <*>nothing<*>
2> ...
=> 4
$ tvstore diff s store:base store:basse
2> tvstore: error: <*>basse<*>
2> ...
=> 10
$ tvstore diff nostore a b
2> tvstore: error: <*>nostore<*>
2> ...
=> 10
