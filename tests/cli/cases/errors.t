# One case of each exit status, with its message.
$ tvstore init s
2> created store s (quota: none)
$ tvstore init s
2> tvstore: error: <*>s<*>
2> ...
=> 4
$ tvstore import s base $DATA/base -q
$ tvstore import s base $DATA/base
2> tvstore: error: <*>base<*>
2> ...
=> 4
$ tvstore import s base $DATA/base --force -q
$ tvstore import s 'a/b' $DATA/base
2> tvstore: error: <*>a/b<*>
2> ...
=> 2
$ tvstore import s x store:base
2> tvstore: error: 'store:base': import takes one directory or file
=> 2
$ tvstore import s x ./nothing
2> tvstore: error: <*>nothing<*>
2> ...
=> 4
$ tvstore import s x no/such-model
2> tvstore: error: <*>no/such-model<*>
2>   hint: <*>hf download no/such-model<*>
=> 4
$ mkdir m && printf 'x' > m/model.safetensors && tvstore import s x m
2> tvstore: error: <*>model.safetensors<*>
2> ...
=> 12
$ tvstore ls nostore
2> tvstore: error: <*>nostore<*>
2> ...
=> 10
$ tvstore rm s nobody
2> tvstore: error: <*>nobody<*>
2> ...
=> 10
$ tvstore info s bsae
2> tvstore: error: <*>bsae<*>
2> ...
=> 10
$ tvstore export s base m
2> tvstore: error: <*>
2> ...
=> 4
$ tvstore init small -q --quota 1MB && tvstore import small base $DATA/base
2> tvstore: error: <*>quota<*>
2> ...
=> 5
# Control characters of a file name do not reach the terminal.
$ tvstore ls "$(printf 'no\033[31mstore')"
2> tvstore: error: <*>no?[31mstore<*>
2> ...
=> 10
