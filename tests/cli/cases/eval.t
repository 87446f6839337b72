# tveval: perplexity, logits, token ids; what it refuses.
$ for c in ppl logits tokenize calibrate; do tveval $c --help > h || echo failed $c; tail -n 1 h | grep -q "^  .*tveval $c" || echo no example $c; grep -q TV_CPU h || echo no environment $c; done
$ tveval ppl $DATA/base --text $DATA/text/prose.val.txt -j 1
TEXT <*>PERPLEXITY <*>TOKENS
<*>prose.val.txt    153.13<n>  <n>  5.03<n>   10200
protocol windows, context 256, BOS 2045, tokenizer <x>
2> <n> tokens per second
$ tveval ppl $DATA/base+$DATA/lora-jargon --text $DATA/text/jargon.val.txt --json -q | grep -v tokens_per
{
  "schema": "tveval.ppl/1",
  "model": "<*>/base+<*>/lora-jargon",
  "protocol": "windows",
  "context": 256,
  "bos": 2045,
  "tokenizer_hash": "<x>",
  "texts": [
    {
      "file": "<*>/jargon.val.txt",
      "tokens": <n>
      "tokens_scored": 9945,
      "nll_mean": 5.489<n>
      "ppl": 242.04<n>
      "stderr": 5.1<n>
    }
  ],
}
$ tveval ppl $DATA/ft-code --text $DATA/text/code.val.txt
2> tveval: error: <*>/ft-code has no tokenizer.json
2> <*>hint: <*>--tokenizer
=> 4
$ tveval ppl $DATA/ft-code --tokenizer $DATA/base --text $DATA/text/code.val.txt -q | sed -n 2p
<*>code.val.txt    101.91<*>
$ for j in 1 2; do tveval ppl $DATA/base --text $DATA/text/code.val.txt -j $j --json -q | grep nll > $j; done; tveval ppl $DATA/base --text $DATA/text/code.val.txt --memory 16MiB --json -q | grep nll > 3; cmp 1 2 && cmp 1 3 && echo same
same
$ for c in ref avx2 avx512; do TV_CPU=$c tveval ppl $DATA/base --text $DATA/text/code.val.txt --memory 16MiB --json -q | grep nll > $c; done; cmp ref avx2 && cmp ref avx512 && echo same; rm ref avx2 avx512
same
$ tvstore init s.tv -q && tvstore import s.tv base $DATA/base -q && tveval ppl store:base --store s.tv --text $DATA/text/code.val.txt --json -q | grep nll > 4; cmp 1 4 && echo same
same
$ printf 'Hello world\n' | tveval tokenize $DATA/base
39 283 603 1553 500 198
$ printf 'Hello world\n' > t.txt; tveval tokenize $DATA/base --text t.txt --special
2045 39 283 603 1553 500 198
$ tveval tokenize $DATA/base --text t.txt --text t.txt
2> tveval: error: --text is given twice<*>
2> <*>
=> 2
$ for n in 0 1 2 30000; do yes '1 Hello world' | head -n $n > j.txt; tveval tokenize $DATA/base --text j.txt --json > j; tr -d ' \n' < j | sed 's/.*"ids":\[\(.*\)\]}$/\1/' | tr , ' ' > a; tveval tokenize $DATA/base --text j.txt | tr -d '\n' | cmp - a; done && wc -w < a
210000
$ printf 'Hi' | tveval tokenize $DATA/base --json
{
  "schema": "tveval.tokenize/1",
  "model": "<*>base",
  "file": null,
  "special": false,
  "n_tokens": 2,
  "ids": [
    39,
    72
  ]
}
$ tveval tokenize $DATA/base --json < /dev/null | tail -n 3; rm a j j.txt
  "n_tokens": 0,
  "ids": []
}
$ printf '\223NUMPY\001\000\166\000%-117s\n\001\000\000\000\000\000\000\000\002\000\000\000\000\000\000\000' "{'descr': '<i8', 'fortran_order': False, 'shape': (1, 2), }" > ids.npy; tveval logits $DATA/base --ids ids.npy -o l.npy && head -c 72 l.npy | tail -c 62; echo; wc -c < l.npy
{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 2048)
16512
$ printf 'x' > bad.npy; tveval logits $DATA/base --ids bad.npy -o no.npy; ls
1
2
3
4
bad.npy
h
ids.npy
l.npy
s.tv
t.txt
2> tveval: error: bad.npy is no .npy file
$ tveval ppl $DATA/base --text t.txt
2> tveval: error: t.txt: the text has 6 tokens, too few for one window of 255
2> <*>hint: a longer text, or a --context of less than 256
=> 4
$ : > e.txt; tveval ppl $DATA/base --text e.txt
2> tveval: error: e.txt: the text has 0 tokens, too few for one window of 255
=> 4
$ tveval ppl $DATA/base --text t.txt --context 999
2> tveval: error: t.txt: a context of 999 tokens, but the model has 256 positions
2> <*>hint: --context takes up to 256 for this model
=> 4
$ tveval ppl $DATA/base --text t.txt --context 999 --protocol stride --json -q | grep tokens_scored
      "tokens_scored": 6,
$ tveval ppl $DATA/base --text t.txt --context 2 --protocol llamacpp
2> tveval: error: t.txt: a context of 2 tokens: --context takes 3 and more for protocol llamacpp
=> 2
$ tveval ppl $DATA/base --text t.txt --context 4 --stride 5 --protocol stride
2> tveval: error: t.txt: --stride 5 is more than the context of 4 tokens
=> 2
$ tveval ppl $DATA/base --text t.txt --context 4 --bos 2048
2> tveval: error: t.txt: BOS 2048 is outside the vocabulary (2048)
2> <*>hint: --bos ID|none
=> 4
$ printf 'abc\377' > b.txt; tveval ppl $DATA/base --text b.txt
2> tveval: error: b.txt: the text is not UTF-8 at byte 3
=> 12
$ tveval ppl $DATA/base
2> tveval: error: no text: add --text FILE
=> 2
$ tveval ppl $DATA/base --text t.txt --protocol llamacp
2> tveval: error: <*>llamacp<*>
2> ...
=> 2
$ tvstore cat s.tv base/model.norm.weight --format raw > norm; python3 -c 'd=open("s.tv/data.mdb","rb").read(); t=open("norm","rb").read(); assert t in d; open("s.tv/data.mdb","wb").write(d.replace(t,t[:7]+bytes([t[7]^16])+t[8:]))'; tveval ppl store:base --store s.tv --text $DATA/text/code.val.txt -q
2> tveval: error: <*>model.norm.weight<*>damaged<*>
=> 12
# --text - is stdin.
$ printf 'def f' > def.txt; tveval tokenize $DATA/base --text def.txt > a; tveval tokenize $DATA/base --text - < def.txt > b; tveval tokenize $DATA/base < def.txt > c; cmp a b && cmp a c
$ tveval tokenize $DATA/base --text - --text def.txt
2> tveval: error: --text is given twice: one text is tokenized
2> ...
=> 2
# An adapter alone is no model.
$ ln -s $DATA/lora-jargon lora && tveval ppl lora --text $DATA/text/code.val.txt
2> tveval: error: lora is an adapter, not a model
2>   hint: write BASE+lora, BASE the model it was trained on ('base' in its adapter_config.json)
=> 4
$ tveval ppl lora --tokenizer $DATA/base --text $DATA/text/code.val.txt
2> tveval: error: lora is an adapter, not a model
2> ...
=> 4
$ tvstore init st -q && tvstore import st lora lora -q && tveval calibrate store:lora --store st --text $DATA/text/code.val.txt
2> tveval: error: store:lora is an adapter, not a model
2>   hint: write BASE+store:lora, BASE the model it was trained on ('base' in its adapter_config.json)
=> 4
$ printf 'merge_method: linear\nmodels: [{model: lora, parameters: {weight: 1}}, {model: %s/base, parameters: {weight: 1}}]\n' $DATA > ad.yml && tvmerge plan ad.yml
2> ad.yml:2:18: error: 'lora' is an adapter; write BASE+lora, BASE the model it was trained on
=> 4
# A text from stdin; all texts are read before the first is scored.
$ tveval ppl $DATA/base --text - -q < $DATA/text/code.val.txt
TEXT <*>
- <*> 171.5515 <*>
protocol <*>
$ tveval ppl $DATA/base --text - --json < $DATA/text/code.val.txt | grep -c '"file": "-"'
1
$ tveval ppl $DATA/base --text - --text - < $DATA/text/code.val.txt
2> tveval: error: --text -: stdin is read once
2> ...
=> 2
$ tveval ppl $DATA/base --text - < /dev/null
2> tveval: error: stdin: <*>
2> ...
=> 4
$ tveval ppl $DATA/base --text $DATA/text/code.val.txt --text gone.txt
2> tveval: error: cannot open gone.txt: no such file or directory
=> 4
