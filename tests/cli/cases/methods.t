# tvmerge methods.
$ tvmerge methods
METHOD <*>BASE      SUMMARY
...
linear <*>optional  <*>
...
$ tvmerge methods -q | sort | grep -cx -e linear -e slerp -e passthrough -e task_arithmetic -e ties -e dare_linear -e dare_ties -e nuslerp -e multislerp -e karcher -e breadcrumbs -e breadcrumbs_ties -e della -e della_linear -e model_stock -e sce -e ram -e ramplus_tl -e nearswap -e arcee_fusion
20
$ tvmerge methods ties
ties: <*>
paper: <*>2306.01708
base model: required
<>
PARAMETER <*>
...
density <*>non_base  float   1  <*>0 to 1  <*>
...
$ tvmerge methods dare-ties
2> tvmerge: error: unknown method 'dare-ties'
2>   hint: did you mean dare_ties?
=> 2
$ tvmerge methods | tail -1
of adapters into an adapter also: cat, svd; with --compat peft: ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune, magnitude_prune_svd
$ tvmerge methods svd
svd: the best adapter of a rank for the weighted sum
merges adapters into an adapter (output: adapter)
<>
PARAMETER <*>
...
rank <*>shared  int <*>from 1 <*>
$ tvmerge methods ties_svd | sed -n 2p
merges adapters into an adapter (output: adapter), as PEFT does, with --compat peft
$ tvmerge methods svd --json | grep -e '"name": "svd"' -e '"output"' -e '"compat"'
      "name": "svd",
      "output": "adapter",
      "compat": null
$ tvmerge methods magnitude-prune
2> tvmerge: error: unknown method 'magnitude-prune'
2>   hint: did you mean magnitude_prune?
=> 2
$ tvmerge methods extract-lora
2> tvmerge: error: unknown method 'extract-lora'
2>   hint: extract-lora is a command: 'tvmerge extract-lora --help'
=> 2
$ tvmerge methods xyzzy
2> tvmerge: error: unknown method 'xyzzy'
2>   hint: 'tvmerge methods' lists them
=> 2
$ tvmerge methods slerp --json
{
  "schema": "tvmerge.methods/1",
  "methods": [
    {
      "name": "slerp",
      "base": "required",
      "needs_statistics": false,
      "parameters": [
        {
          "name": "t",
          "scope": "shared",
          "type": "float",
          "default": null,
          "required": true,
          "help": <*>
...
  ]
}
