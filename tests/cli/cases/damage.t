# A flipped bit in a stored payload: verify names it, readers stop.
$ tvstore init s -q && tvstore import s base $DATA/base -q
$ tvstore cat s base/model.norm.weight --format raw > norm
$ python3 -c 'd=open("s/data.mdb","rb").read(); t=open("norm","rb").read(); assert t in d; open("s/data.mdb","wb").write(d.replace(t,t[:7]+bytes([t[7]^16])+t[8:]))'
$ tvstore verify s
damaged: base/model.norm.weight: <*>
2> tvstore: error: s is damaged (1 problem)
=> 12
$ tvstore verify s --json
{
  "schema": "tvstore.verify/1",
  "ok": false,
  "problems": [
    {
      "object": "base",
      "tensor": "model.norm.weight",
      "message": "<*>"
    }
  ]
}
2> {"error": {"code": "corrupt", "message": "s is damaged (1 problem)", "hint": ""}}
=> 12
$ tvstore cat s base/model.norm.weight
2> tvstore: error: base/model.norm.weight: checksum error in the 1 MiB at byte 0
=> 12
$ tvstore info s base/model.norm.weight --stats
2> tvstore: error: base/model.norm.weight: checksum error in the 1 MiB at byte 0
=> 12
$ tvstore diff s store:base $DATA/base
2> tvstore: error: <*>model.norm.weight: checksum error in the 1 MiB at byte 0
=> 12
$ printf 'merge_method: passthrough\nmodels:\n- model: store:base\n' > r.yml
$ tvmerge r.yml out --store s -q
2> tvmerge: error: <*>model.norm.weight<*>
2> ...
=> 12
$ test ! -e out/config.json
# Unless it is told not to look.
$ tvmerge r.yml out --store s -q --no-verify-reads --force
$ python3 -c 'a=open("norm","rb").read(); d=open("out/model.safetensors","rb").read(); assert a not in d and a[:7]+bytes([a[7]^16])+a[8:] in d'
# A linked file that changed is named.
$ cp -r $DATA/ft-code m && chmod -R u+w m && tvstore init l -q && tvstore import l code m --link -q
$ tvstore cat l code/model.norm.weight | wc -l
128
$ touch -d @1 m/model.safetensors
$ tvstore cat l code/model.norm.weight
2> tvstore: error: <*>model.safetensors<*>
2> ...
=> 12
# A store whose tree is nonsense does not take verify down.
$ tvstore init t -q && tvstore import t base $DATA/base -q
$ python3 -c 'd=bytearray(open("t/data.mdb","rb").read()); d[8192:]=bytes((i*37+11)&255 for i in range(len(d)-8192)); open("t/data.mdb","wb").write(d)'
$ tvstore verify t >log 2>&1; echo $?; grep -c -i -e damage -e corrupt -e checksum log | sed 's/[1-9][0-9]*/some/'
12
some
