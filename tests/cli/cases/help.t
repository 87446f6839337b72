# Help ends with examples and names the environment; versions are complete.
$ tvstore --help | sed -n '1,2p'
Usage: tvstore [OPTION...] COMMAND [ARG...]
Keeps models, adapters and merges in one memory-mapped store.
$ tvmerge --help | sed -n '1,2p'
Usage: tvmerge [OPTION...] COMMAND [ARG...]
  or:  tvmerge [OPTION...] RECIPE OUT [OPTION...]
$ for c in init import ls info cat export diff stat quota verify rm gc mask compact; do tvstore $c --help > h || echo failed $c; tail -n 1 h | grep -q "^  .*tvstore $c" || echo no example $c; grep -q TV_CPU h || echo no environment $c; done
$ for c in run plan status methods; do tvmerge $c --help > h || echo failed $c; tail -n 1 h | grep -q "^  .*tvmerge" || echo no example $c; grep -q TV_STORE h || echo no environment $c; done
$ tvstore ls --help
Usage: tvstore ls [OPTION...] STORE [NAME]
...
  -q, --quiet <*>
...
  TV_STORE <*>
  TV_CPU <*>
  TV_CUDA_LEAST <*>
...
  TV_PROGRESS <*>
  NO_COLOR <*>
  HF_HUB_CACHE, HF_HOME, XDG_CACHE_HOME
...
Examples:
  tvstore ls models.tv
  tvstore ls models.tv base --layer model.layers.1
  tvstore ls models.tv base --json
$ tvmerge run --usage | head -n 1
Usage: tvmerge run <*>
$ TV_CPU=ref tvmerge --version
tvmerge <n>
libraries: LMDB <n>, <*>jansson <n>, libyaml <n>, <*>
CPU features: <*> (kernels: ref)
CUDA: <*>
$ tvstore -V --json | head -n 3
{
  "schema": "tvstore.version/1",
  "version": "<n>",
# Examples can be pasted: each line is a command, or goes on with a backslash.
$ for t in tvstore tvmerge; do for c in $($t --help | sed -n '/^Commands/,/^$/s/^  \([a-z-]*\).*/\1/p'); do $t $c --help | sed -n '/^Examples/,$p' | grep -v '^Examples:$\|^  \(TV_STORE=[a-z.]* \)\?\(echo [A-Za-z]* | \)\?tv\|^    --'; done; done
=> 1
$ tvmerge compare --help | grep -A1 -e '--methods ties,tsv'
  tvmerge compare recipe.yml -o cmp --text a.txt --methods ties,tsv,iso_c \
    --keep best
# As a command too.
$ tvmerge help > a && tvmerge --help | cmp - a && tvstore help import > b && tvstore import --help | cmp - b
$ tveval help pp
2> tveval: error: unknown command 'pp'
2>   hint: did you mean 'tveval ppl'?
=> 2
