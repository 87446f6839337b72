# What the parser says: unknown things, suggestions, exit code 2.
$ tvstore
2> tvstore: error: a command is missing
2>   hint: 'tvstore --help' lists the commands
=> 2
$ tvstore lss
2> tvstore: error: unknown command 'lss'
2>   hint: did you mean 'tvstore ls'?
=> 2
$ tvmerge run
2> tvmerge: error: arguments are missing
2>   hint: usage: tvmerge run [OPTION...] RECIPE OUT, or RECIPE --into NAME --store STORE
=> 2
$ tvstore improt
2> tvstore: error: unknown command 'improt'
2>   hint: did you mean 'tvstore import'?
=> 2
$ tvmerge plna r
2> tvmerge: error: unknown command 'plna'
2>   hint: did you mean 'tvmerge plan'?
=> 2
$ tvmerge xyzzy
2> tvmerge: error: unknown command 'xyzzy'
2>   hint: 'tvmerge --help' lists the commands
=> 2
$ tvstore --jsn ls s
2> tvstore: error: unknown option '--jsn'
2>   hint: did you mean --json?
=> 2
$ tvstore ls s --layr x
2> tvstore: error: unknown option '--layr'
2>   hint: did you mean --layer?
=> 2
$ tvstore ls s -z
2> tvstore: error: unknown option '-z'
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore -vz ls s
2> tvstore: error: unknown option '-z'
=> 2
$ tvstore ls s --layer
2> tvstore: error: option '--layer' needs a value (PREFIX)
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore ls s --json=yes
2> tvstore: error: option '--json' takes no value
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore ls
2> tvstore: error: arguments are missing
2>   hint: usage: tvstore ls [OPTION...] STORE [NAME]
=> 2
$ tvstore import s name
2> tvstore: error: an argument is missing
2>   hint: usage: tvstore import [OPTION...] STORE NAME SRC
=> 2
$ tvstore ls a b c
2> tvstore: error: unexpected argument 'c'
2>   hint: usage: tvstore ls [OPTION...] STORE [NAME]
=> 2
$ tvstore ls s --layer x
2> tvstore: error: --layer needs the NAME of an object
=> 2
$ tvstore init s --quota lots
2> tvstore: error: --quota: 'lots' is not a size
2>   hint: sizes look like 18GB, 1.5GiB or 4096; none (or 0) is no limit
=> 2
$ tvstore ls s --threads 0
2> tvstore: error: --threads: '0' is not a number from 1 to 1024
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore ls s --threads many
2> tvstore: error: --threads: 'many' is not a number from 1 to 1024
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore ls s --memory 0
2> tvstore: error: --memory: 0 bytes are too few
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore ls s --progress loud
2> tvstore: error: --progress: 'loud' is not one of auto, bar, plain, json, none
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore ls s --color red
2> tvstore: error: --color: 'red' is not one of auto, always, never
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvstore rm s x --lock-timeout soon
2> tvstore: error: --lock-timeout: 'soon' is not a time in seconds (or 500ms)
2>   hint: 'tvstore rm --help' lists the options
=> 2
$ TV_PROGRESS=loud tvstore ls s
2> tvstore: error: TV_PROGRESS: 'loud' is not one of auto, bar, plain, json, none
=> 2
$ TV_CPU=sse9 tvmerge methods
2> tvmerge: error: TV_CPU: 'sse9' is not one of ref, avx2, avx512, amx
=> 2
$ tvstore ls s --device tpu
2> tvstore: error: --device: 'tpu' is not one of auto, cpu, cuda
2>   hint: did you mean 'cpu'?
=> 2
$ tvstore ls s --device cuda:77
2> tvstore: error: --device cuda:77: <*>
2>   hint: --device cpu does all that is done there (matrix work within rounding)
=> 4
$ tvstore ls s --device-memory 0
2> tvstore: error: --device-memory: 0 bytes are too few
2>   hint: 'tvstore ls --help' lists the options
=> 2
$ tvmerge --randm-seed 3 r.yml out
2> tvmerge: error: unknown option '--randm-seed'
2>   hint: did you mean --random-seed?
=> 2
$ tvmerge --random-seed 3 plan r.yml
2> tvmerge: error: options of a command go behind its name: tvmerge plan
=> 2
$ tvstore ls nostore --json
2> {"error": {"code": "not-found", "message": "<*>nostore<*>", "hint": "<*>"}}
=> 10
$ tvstore --nonsense --json
2> {"error": {"code": "usage", "message": "unknown option '--nonsense'", "hint": ""}}
=> 2
