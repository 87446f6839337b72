# tvstore: the life of a store.
$ tvstore init s --quota 40MB
2> created store s (quota: 38.1 MiB)
$ tvstore import s base $DATA/base
2> imported base: 38 tensors, 1.9 MiB in <*>
$ tvstore import s jargon $DATA/lora-jargon -q
$ tvstore import s again $DATA/base --json
{
  "schema": "tvstore.import/1",
  "name": "again",
  "kind": "model",
  "n_tensors": 38,
  "n_resumed": 0,
  "bytes": 2001152,
  "bytes_shared": 2001152,
  "linked": false,
  "seconds": <n>
}
$ tvstore import s prose $DATA/ft-prose --link
2> linked prose: 38 tensors, 1.9 MiB in <*>
$ tvstore ls s
NAME    KIND     ARCHITECTURE      TENSORS       SIZE  STATE
again   model    LlamaForCausalLM       38    1.9 MiB  complete
base    model    LlamaForCausalLM       38    1.9 MiB  complete
jargon  adapter  -                      56  292.0 KiB  complete
prose   model    LlamaForCausalLM       38    1.9 MiB  complete, linked
$ tvstore ls s -q
again
base
jargon
prose
$ tvstore ls s base --layer model.layers.1.self -q
model.layers.1.self_attn.k_proj.weight
model.layers.1.self_attn.o_proj.weight
model.layers.1.self_attn.q_proj.weight
model.layers.1.self_attn.v_proj.weight
$ tvstore ls s base --layer model.norm
NAME               DTYPE  SHAPE  BYTES  STORAGE  CHECKSUM
model.norm.weight  BF16   [128]    256  inline   <x>
$ tvstore ls s prose --layer model.norm --json
{
  "schema": "tvstore.ls/1",
  "object": {
    "name": "prose",
    "kind": "model",
    "architecture": "LlamaForCausalLM",
    "n_tensors": 38,
    "bytes": 2001152,
    "linked": true,
    "complete": true
  },
  "tensors": [
    {
      "name": "model.norm.weight",
      "dtype": "BF16",
      "shape": [
        128
      ],
      "bytes": 256,
      "checksum": <*>,
      "storage": "linked"
    }
  ]
}
$ tvstore info s base
name          base
kind          model
architecture  LlamaForCausalLM
family        llama, 4 layers, hidden 128, vocabulary 2048, tied
tensors       38 (BF16 38)
parameters    1,000,576
bytes         2,001,152 (1.9 MiB)
storage       inline
source        <*>/base
digest        <x>
side files    config.json (725 B)
              generation_config.json (225 B)
              tokenizer.json (121.3 KiB)
              tokenizer_config.json (285 B)
$ tvstore info s base/model.norm.weight --stats
object        base
tensor        model.norm.weight
role          final_norm
dtype         BF16
shape         [128]
elements      128
bytes         256
storage       inline
checksum      <x>
min           1.03125
max           1.234375
mean          1.14196777
norm          12.9263473
non-finite    0
$ tvstore info s base --stats | grep -c proj.weight
28
# A linked object is shown without reading it, and when its files are gone.
$ cp -r $DATA/base away && tvstore import s away away --link -q
$ tvstore info s away | grep -e storage -e digest
storage       linked
digest        unknown until it is read (--digest)
$ tvstore info s away --digest | grep digest
digest        <x>
$ rm -r away && tvstore info s away --json | grep '"digest": null'
  "digest": null,
$ tvstore info s away --digest
2> tvstore: error: tensor '<*>': linked file <*>/away/model.safetensors is gone
2> <*>
=> 12
$ tvstore rm s away -q
$ tvstore quota s
quota 38.1 MiB, used <*>
$ tvstore quota s 1GiB
quota 1.0 GiB, used <*>
$ tvstore quota s 0
quota none, used <*>
$ tvstore quota s 1GiB > x; tvstore quota s none
quota none, used <*>
$ tvstore quota s unlimited
2> tvstore: error: SIZE: 'unlimited' is not a size
2>   hint: sizes look like 18GB, 1.5GiB or 4096; none (or 0) is no limit
=> 2
$ printf 'no model, but a text\n' > text.txt; tvstore import s text text.txt
2> tvstore: error: text.txt: no safetensors file: header length <n> at byte 0 is above the limit of <n>
=> 12
$ tvstore stat s
WHAT <*>
quota                  none          -
used <*>
data file <*>
  weights           1.9 MiB  2,001,152
  adapters        292.0 KiB    299,008
  masks                 0 B          0
  statistics            0 B          0
  task vectors          0 B          0
  outputs               0 B          0
  journal               0 B          0
  free <*>
saved by sharing    1.9 MiB  2,001,152
$ tvstore export s base out
2> exported base to out: 38 tensors, 1.9 MiB in <*>
$ cmp out/config.json $DATA/base/config.json && cmp out/tokenizer.json $DATA/base/tokenizer.json
$ tvstore diff s store:base out
38 tensors, all equal
$ tvstore rm s again
2> removed again
$ tvstore gc s
2> freed <*> inside the store
$ tvstore verify s
2> s: everything is as it was written
$ tvstore verify s --json
{
  "schema": "tvstore.verify/1",
  "ok": true,
  "problems": []
}
