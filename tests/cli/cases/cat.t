# tvstore cat: formats and slices.
$ tvstore init s -q && tvstore import s base $DATA/base -q
$ tvstore cat s base/model.layers.0.self_attn.k_proj.weight --slice 0:2,-3:
0.0049438477 0.048095703 -0.0013961792
0.0036010742 -0.012451172 0.036376953
$ tvstore cat s base/model.norm.weight --slice :2
1.1953125
1.1328125
$ tvstore cat s base/model.norm.weight --slice :2 --bits
16281
16273
$ tvstore cat s base/model.norm.weight | wc -l
128
$ tvstore cat s base/model.norm.weight --slice 5:5
$ tvstore cat s base/model.norm.weight --slice 9:2
$ tvstore cat s base/model.norm.weight --slice -2: | wc -l
2
$ tvstore cat s base/model.norm.weight --slice 120:9999 | wc -l
8
$ tvstore cat s base/model.norm.weight --format raw | wc -c
256
$ tvstore cat s base/model.norm.weight --format npy --slice :4 | head -c 8 | od -An -c
 223   N   U   M   P   Y 001  \0
$ tvstore cat s base/model.norm.weight --slice 1
2> tvstore: error: --slice: '1' is not a slice
2>   hint: slices look like 0:4 or 0:4,-8: (bounds as in Python)
=> 2
$ tvstore cat s base/model.norm.weight --slice 1:2:3
2> tvstore: error: --slice: <*>
2> ...
=> 2
$ tvstore cat s base/model.norm.weight --slice 1:2,
2> tvstore: error: --slice: <*>
2> ...
=> 2
$ tvstore cat s base/model.norm.weight --slice -:2
2> tvstore: error: --slice: <*>
2> ...
=> 2
$ tvstore cat s base/model.norm.weight --slice 1:2,3:4
2> tvstore: error: --slice '1:2,3:4' has more parts than the 1 dimensions of model.norm.weight
=> 2
$ tvstore cat s base/model.norm.weight --format csv
2> tvstore: error: --format: 'csv' is not one of text, raw, npy
2>   hint: 'tvstore cat --help' lists the options
=> 2
$ tvstore cat s base
2> tvstore: error: 'base' does not name a tensor
2>   hint: write NAME/TENSOR
=> 2
$ tvstore cat s base/nothing
2> tvstore: error: base has no tensor 'nothing'
2>   hint: 'tvstore ls s base' lists its tensors
=> 10
$ tvstore cat s nobody/nothing
2> tvstore: error: <*>nobody<*>
2> ...
=> 10
$ tvstore cat s base/model.norm.weight --json
2> {"error": {"code": "usage", "message": "cat prints data and has no --json", "hint": ""}}
=> 2
