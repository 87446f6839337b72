#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Writes tests/data/bad (one defect per file) and tests/data/good.

Run from anywhere: tools/gen_badfiles.py. Needs the standard library only; the
output is committed and depends on nothing but this file. Beside the files it
writes an EXPECT list per tree, which tests/format/test_badfiles.c reads: path,
error code (tv_err_name), a part of the message. Seeds of the fuzz targets go to
tests/fuzz/corpus.

Pickles are assembled by hand, not by pickle.dumps, because the point is to hold
what no pickler writes. Raw pickles (pickle/*.pkl) are read against two
storages: "0" with 64 bytes and "1" with 16 bytes.
"""
import json
import pathlib
import shutil
import struct
import zlib

ROOT = pathlib.Path(__file__).resolve().parent.parent
OUT = ROOT / "tests/data"
expect = {"bad": [], "good": []}


def put(tree, name, data, code="ok", part=""):
    path = OUT / tree / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    expect[tree].append(f"{name}\t{code}\t{part}")


def bad(name, data, part, code="corrupt"):
    put("bad", name, data, code, part)


def good(name, data):
    put("good", name, data)


# ---- safetensors -----------------------------------------------------------

def raw(header, payload=b"", length=None):
    if isinstance(header, str):
        header = header.encode()
    return struct.pack("<Q", len(header) if length is None else length) \
        + header + payload


def st(tensors, payload=None, meta=None):
    """tensors: name -> (dtype, shape, begin, end)"""
    head = {}
    if meta is not None:
        head["__metadata__"] = meta
    for name, (dtype, shape, begin, end) in tensors.items():
        head[name] = {"dtype": dtype, "shape": shape,
                      "data_offsets": [begin, end]}
    if payload is None:
        n = max([t[3] for t in tensors.values()], default=0)
        payload = bytes(i & 0xff for i in range(n))
    return raw(json.dumps(head, separators=(",", ":")), payload)


def entry(dtype='"F32"', shape="[2]", offsets="[0,8]", more=""):
    return f'{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{more}}}'


def one(name="a", payload=8, **kw):
    return raw(f'{{"{name}":{entry(**kw)}}}', bytes(payload))


def safetensors_bad():
    d = "safetensors/"
    bad(d + "empty_file.safetensors", b"", "too short")
    bad(d + "seven_bytes.safetensors", b"\0" * 7, "too short")
    bad(d + "length_beyond_file.safetensors", raw("{}", length=3),
        "header length 3 at byte 0, but only 2 bytes follow")
    bad(d + "length_above_limit.safetensors", raw("{}", length=(32 << 20) + 1),
        "above the limit")
    bad(d + "length_huge.safetensors", raw("{}", length=2**64 - 1),
        "above the limit")
    bad(d + "empty_header.safetensors", raw(""), "bad JSON at byte 8")
    bad(d + "not_object.safetensors", raw("[]"), "not a JSON object")
    bad(d + "truncated_json.safetensors", raw('{"a":'), "bad JSON at byte")
    bad(d + "garbage_behind.safetensors", raw("{} x"), "bad JSON at byte")
    bad(d + "nul_padding.safetensors", raw("{}\0\0"), "bad JSON at byte 11")
    bad(d + "comment.safetensors", raw("{/* */}"), "bad JSON at byte")
    bad(d + "nan.safetensors", one(offsets="[0,NaN]"), "bad JSON at byte")
    bad(d + "not_utf8.safetensors", raw(b'{"a\xff":1}'), "not UTF-8 at byte 11")
    bad(d + "overlong_utf8.safetensors", raw(b'{"\xc0\xaf":1}'),
        "not UTF-8 at byte 10")
    bad(d + "utf8_surrogate.safetensors", raw(b'{"\xed\xa0\x80":1}'),
        "not UTF-8 at byte 10")
    bad(d + "lone_surrogate.safetensors", one(name="\\ud800"),
        "bad JSON at byte")
    bad(d + "deep_nesting.safetensors", raw("[" * 3000),
        "nested deeper than 64 levels at byte 72")
    bad(d + "deep_objects.safetensors", raw('{"a":' * 70 + "1" + "}" * 70),
        "nested deeper than 64 levels at byte")
    bad(d + "duplicate_tensor.safetensors",
        raw(f'{{"a":{entry()},"a":{entry()}}}', bytes(8)), "duplicate")
    bad(d + "duplicate_field.safetensors",
        one(more=',"dtype":"F32"'), "duplicate")
    bad(d + "empty_name.safetensors", one(name=""), "empty name")
    bad(d + "nul_name.safetensors", one(name="a\\u0000b"), "bad JSON at byte")
    bad(d + "long_name.safetensors", one(name="n" * 4097), "longer than 4096")
    bad(d + "entry_not_object.safetensors", raw('{"a":3}'),
        "tensor 'a': its entry is not an object")
    bad(d + "no_dtype.safetensors",
        raw('{"a":{"shape":[2],"data_offsets":[0,8]}}', bytes(8)),
        "tensor 'a': dtype is missing")
    bad(d + "unknown_dtype.safetensors", one(dtype='"F33"'),
        "tensor 'a': unknown dtype 'F33'")
    bad(d + "lower_dtype.safetensors", one(dtype='"f32"'),
        "tensor 'a': unknown dtype 'f32'")
    bad(d + "dtype_number.safetensors", one(dtype="32"),
        "tensor 'a': dtype is missing or not a string")
    bad(d + "no_shape.safetensors",
        raw('{"a":{"dtype":"F32","data_offsets":[0,8]}}', bytes(8)),
        "tensor 'a': shape is missing")
    bad(d + "negative_shape.safetensors", one(shape="[-2]"),
        "tensor 'a': shape holds something other")
    bad(d + "float_shape.safetensors", one(shape="[2.0]"),
        "tensor 'a': shape holds something other")
    bad(d + "string_shape.safetensors", one(shape='["2"]'),
        "tensor 'a': shape holds something other")
    bad(d + "huge_shape.safetensors", one(shape="[18446744073709551616]"),
        "bad JSON at byte")
    bad(d + "overflow_shape.safetensors",
        one(shape="[4294967296,4294967296,4294967296]"), "tensor 'a'")
    bad(d + "overflow_bytes.safetensors",
        one(shape="[9223372036854775807]"), "tensor 'a'")
    bad(d + "rank_nine.safetensors", one(shape="[1,1,1,1,1,1,1,1,2]"),
        "tensor 'a': shape has more than 8 dimensions")
    bad(d + "no_offsets.safetensors",
        raw('{"a":{"dtype":"F32","shape":[2]}}', bytes(8)),
        "tensor 'a': data_offsets is not a pair")
    bad(d + "three_offsets.safetensors", one(offsets="[0,8,8]"),
        "tensor 'a': data_offsets is not a pair")
    bad(d + "negative_offset.safetensors", one(offsets="[-8,0]"),
        "tensor 'a': data_offsets is not a pair")
    bad(d + "float_offset.safetensors", one(offsets="[0.0,8]"),
        "tensor 'a': data_offsets is not a pair")
    bad(d + "reversed_offsets.safetensors", one(offsets="[8,0]"),
        "tensor 'a': data_offsets [8, 0] do not lie")
    bad(d + "offset_beyond_file.safetensors", one(offsets="[0,9]"),
        "tensor 'a': data_offsets [0, 9] do not lie in the 8 data bytes")
    bad(d + "wrong_bytes.safetensors", one(offsets="[0,8]", shape="[3]"),
        "tensor 'a': data_offsets [0, 8] hold 8 bytes")
    bad(d + "truncated_payload.safetensors", one(payload=7),
        "tensor 'a': data_offsets [0, 8] do not lie in the 7 data bytes")
    bad(d + "bytes_behind.safetensors", one(payload=9),
        "the tensors end at data byte 8, the file has 9")
    bad(d + "hole.safetensors",
        st({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 12, 20)}),
        "tensor 'b' begins at data byte 12, the one before it ends at 8 (hole)")
    bad(d + "hole_at_start.safetensors", st({"a": ("F32", [2], 4, 12)}),
        "tensor 'a' begins at data byte 4, the one before it ends at 0 (hole)")
    bad(d + "overlap.safetensors",
        st({"a": ("F32", [2], 0, 8), "b": ("F32", [2], 4, 12)}),
        "(overlap)")
    bad(d + "many_on_one_range.safetensors",
        st({f"t{i}": ("F32", [2], 0, 8) for i in range(50)}), "(overlap)")
    bad(d + "half_byte.safetensors", one(dtype='"F4"', shape="[3]",
                                         offsets="[0,2]", payload=2),
        "tensor 'a'")
    bad(d + "metadata_number.safetensors",
        raw('{"__metadata__":{"format":1}}'), "__metadata__ 'format' is not")
    bad(d + "metadata_list.safetensors", raw('{"__metadata__":[]}'),
        "__metadata__ is not an object")
    bad(d + "metadata_incomplete_buffer.safetensors",
        raw('{"__metadata__":{"format":"pt"}}', b"\0"),
        "the tensors end at data byte 0, the file has 1")


def safetensors_good():
    d = "safetensors/"
    good(d + "empty.safetensors", raw("{}"))
    good(d + "metadata_only.safetensors", st({}, meta={"format": "pt"}))
    good(d + "scalar.safetensors", st({"s": ("F32", [], 0, 4)}))
    good(d + "zero_size.safetensors",
         st({"z": ("F32", [0, 7], 0, 0), "a": ("F32", [1], 0, 4)}))
    good(d + "leading_spaces.safetensors",
         raw("  \n" + '{"a":' + entry() + "}   ", bytes(8)))
    good(d + "unknown_field.safetensors", one(more=',"note":"x"'))
    good(d + "unaligned_payload.safetensors",
         raw('{"a":' + entry() + "}", bytes(8)))
    good(d + "unsorted.safetensors",
         st({"b": ("F32", [2], 8, 16), "a": ("U8", [8], 0, 8)}))
    good(d + "sub_byte.safetensors", st({"a": ("F4", [4], 0, 2)}))
    sizes = {"BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8,
             "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16,
             "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
             "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64, "F4": 4,
             "F6_E2M3": 6, "F6_E3M2": 6}
    at, tensors = 0, {}
    for name, bits in sizes.items():
        end = at + 8 * bits // 8
        tensors["t." + name] = (name, [2, 4], at, end)
        at = end
    good(d + "all_dtypes.safetensors", st(tensors, meta={"format": "pt"}))


# ---- pickles ---------------------------------------------------------------

def uni(s):
    b = s if isinstance(s, bytes) else s.encode()
    return b"X" + struct.pack("<I", len(b)) + b


def num(i):
    if 0 <= i < 256:
        return b"K" + bytes([i])
    if 0 <= i < 65536:
        return b"M" + struct.pack("<H", i)
    return b"J" + struct.pack("<i", i)


def tup(*items):
    return b"(" + b"".join(items) + b"t"


def glob(module, name):
    return f"c{module}\n{name}\n".encode()


ODICT = glob("collections", "OrderedDict") + b")R"
REBUILD = glob("torch._utils", "_rebuild_tensor_v2")


def storage(key="0", kind="FloatStorage", n=16):
    return tup(uni("storage"), glob("torch", kind), uni(key), uni("cpu"),
               num(n)) + b"Q"


def tensor(size=(4, 4), stride=(4, 1), offset=0, store=None, grad=b"\x89",
           hooks=ODICT, more=b""):
    return (REBUILD + b"(" + (storage() if store is None else store)
            + num(offset) + tup(*map(num, size)) + tup(*map(num, stride))
            + grad + hooks + more + b"tR")


def state(items, build=b""):
    body = b"".join(uni(k) + v for k, v in items)
    return b"\x80\x02" + ODICT + b"(" + body + b"u" + build + b"."


METADATA = (b"}" + uni("_metadata") + ODICT + uni("") + b"}" + uni("version")
            + num(1) + b"s" + b"s" + b"s" + b"b")


def pickle_bad():
    d = "pickle/"
    w = [("w", tensor())]

    def value(name, v, part):
        bad(d + name, state([("w", v)]), part)

    bad(d + "empty.pkl", b"", "pickle byte 0: the pickle ends")
    bad(d + "truncated.pkl", state(w)[:-10], "the pickle ends within")
    bad(d + "no_stop.pkl", state(w)[:-1], "the pickle ends within")
    bad(d + "protocol_9.pkl", b"\x80\x09}.", "an unknown pickle protocol")
    bad(d + "protocol_0.pkl", b"(dp0\n.", "instruction DICT is not allowed")
    for name, module, fn in [("os_system", "os", "system"),
                             ("posix_system", "posix", "system"),
                             ("builtins_eval", "builtins", "eval"),
                             ("getattr", "__builtin__", "getattr"),
                             ("torch_load", "torch", "load"),
                             ("torch_hub", "torch.hub", "load"),
                             ("rebuild_v3", "torch._utils",
                              "_rebuild_tensor_v3"),
                             ("untyped", "torch.storage", "UntypedStorage"),
                             ("fake_prefix", "collectionsX", "OrderedDict")]:
        bad(d + f"global_{name}.pkl",
            b"\x80\x02" + glob(module, fn) + b"(" + uni("id") + b"tR.",
            f"refers to {module}.{fn}, which is not allowed")
    bad(d + "global_dotted.pkl",
        b"\x80\x02" + glob("collections", "OrderedDict.fromkeys") + b".",
        "refers to collections.OrderedDict.fromkeys")
    bad(d + "global_no_newline.pkl", b"\x80\x02cos", "the pickle ends within")
    bad(d + "global_endless.pkl", b"\x80\x02c" + b"x" * 4000, "refers to xxx")
    bad(d + "stack_global.pkl",
        b"\x80\x04" + b"\x8c\x02os" + b"\x8c\x06system" + b"\x93.",
        "instruction SHORT_BINUNICODE is not allowed")
    for op, name in [(b"i", "INST"), (b"o", "OBJ"), (b"\x81", "NEWOBJ"),
                     (b"\x92", "NEWOBJ_EX"), (b"\x93", "STACK_GLOBAL"),
                     (b"P", "PERSID"), (b"\x82", "EXT1"), (b"\x95", "FRAME"),
                     (b"\x94", "MEMOIZE"), (b"\x8a", "LONG1"), (b"L", "LONG"),
                     (b"G", "BINFLOAT"), (b"F", "FLOAT"), (b"0", "POP"),
                     (b"1", "POP_MARK"), (b"2", "DUP"), (b"S", "STRING"),
                     (b"V", "UNICODE"), (b"g", "GET"), (b"p", "PUT"),
                     (b"\x8f", "EMPTY_SET"), (b"\xff", "0xff"),
                     (b"\x00", "0x00")]:
        bad(d + f"opcode_{name.lower()}.pkl", b"\x80\x02}" + op + b".",
            f"pickle byte 3: instruction {name} is not allowed")
    bad(d + "reduce_storage_type.pkl",
        b"\x80\x02" + glob("torch", "FloatStorage") + b")R.",
        "REDUCE of something that is no allowed callable")
    bad(d + "reduce_string.pkl", b"\x80\x02" + uni("os") + b")R.",
        "REDUCE of something that is no allowed callable")
    bad(d + "reduce_no_tuple.pkl",
        b"\x80\x02" + glob("collections", "OrderedDict") + b"}R.",
        "REDUCE without an argument tuple")
    bad(d + "ordered_dict_arguments.pkl",
        b"\x80\x02" + glob("collections", "OrderedDict") + tup(b"]") + b"R.",
        "OrderedDict with arguments")
    bad(d + "build_tensor.pkl", state([("w", tensor() + b"}b")]),
        "BUILD of something other")
    bad(d + "build_attribute.pkl",
        state(w, b"}" + uni("__class__") + uni("x") + b"sb"),
        "BUILD of something other")
    bad(d + "build_setstate.pkl", state(w, tup(b"N", b"}") + b"b"),
        "BUILD of something other")
    bad(d + "deep_tuples.pkl", b"\x80\x02)" + b"\x85" * 100 + b".",
        "tuples nested too deeply")
    bad(d + "mark_flood.pkl", b"\x80\x02" + b"(" * 1000 + b".",
        "too many open MARKs")
    bad(d + "memo_gap.pkl", b"\x80\x02}r" + struct.pack("<I", 0x7fffffff) + b".",
        "a memo number out of order")
    bad(d + "memo_unset.pkl", b"\x80\x02h\x05.", "never set")
    bad(d + "memo_empty_stack.pkl", b"\x80\x02q\x00.", "stack is too short")
    bad(d + "string_length.pkl", b"\x80\x02X\xff\xff\xff\xffabc.",
        "the pickle ends within")
    bad(d + "string_not_utf8.pkl", b"\x80\x02" + uni(b"\xed\xa0\x80") + b".",
        "not UTF-8")
    bad(d + "stack_empty.pkl", b"\x80\x02R.", "stack is too short")
    bad(d + "tuple_without_mark.pkl", b"\x80\x02Nt.", "no MARK")
    bad(d + "pop_below_mark.pkl", b"\x80\x02N(\x85.", "stack is too short")
    bad(d + "reduce_below_mark.pkl",
        b"\x80\x02" + glob("collections", "OrderedDict") + b"()R.",
        "stack is too short")
    bad(d + "items_for_tuple.pkl", b"\x80\x02)(" + uni("a") + b"Nu.",
        "no dict")
    bad(d + "items_for_nothing.pkl", b"\x80\x02(" + uni("a") + b"Nu.",
        "stack is too short")
    bad(d + "key_without_value.pkl", b"\x80\x02}(" + uni("a") + b"u.",
        "a dict key without a value")
    bad(d + "key_number.pkl", b"\x80\x02}K\x01Ns.", "a dict key that is no")
    bad(d + "append_to_dict.pkl", b"\x80\x02}Na.", "no list")
    bad(d + "leftover.pkl", b"\x80\x02}}.", "STOP with other values")
    bad(d + "open_mark.pkl", b"\x80\x02}(.", "STOP with other values")
    bad(d + "stop_at_once.pkl", b"\x80\x02.", "STOP with other values")
    bad(d + "root_list.pkl", b"\x80\x02].", "does not hold a dict")
    bad(d + "root_tensor.pkl", b"\x80\x02" + tensor() + b".",
        "does not hold a dict")
    bad(d + "duplicate_name.pkl", state(w + w), "tensor 'w' occurs twice")
    bad(d + "empty_name.pkl", state([("", tensor())]), "empty or too long")
    bad(d + "long_name.pkl", state([("n" * 4097, tensor())]),
        "empty or too long")
    bad(d + "nul_name.pkl", state([("a\0b", tensor())]), "holds a NUL")
    value("value_number.pkl", num(3), "entry 'w' is not a tensor")
    value("value_nested.pkl", b"}", "entry 'w' is not a tensor")
    value("value_storage.pkl", storage(), "entry 'w' is not a tensor")
    value("persid_string.pkl", uni("x") + b"Q", "no storage")
    value("persid_short.pkl", tup(uni("storage")) + b"Q", "no storage")
    value("persid_other.pkl",
          tup(uni("module"), glob("torch", "FloatStorage"), uni("0"),
              uni("cpu"), num(16)) + b"Q", "no storage")
    value("persid_negative.pkl", storage(n=-1), "no storage")
    value("storage_missing.pkl", tensor(store=storage(key="9")),
          "storage '9' is not in the file")
    value("storage_traversal.pkl", tensor(store=storage(key="../version")),
          "storage '../version' is not in the file")
    value("storage_short.pkl", tensor(store=storage(n=17)),
          "should have 17 elements of F32, but has 64 bytes")
    value("storage_nul.pkl", tensor(store=storage(key="0\0")), "holds a NUL")
    value("stride_beyond.pkl", tensor(stride=(5, 1)), "outside its storage")
    value("stride_overflow.pkl",
          tensor(size=(2**31 - 1,) * 4 + (0x7fff,), stride=(1,) * 5),
          "pickle byte")
    value("stride_far.pkl", tensor(size=(2, 2), stride=(2**31 - 1, 1)),
          "outside its storage")
    value("stride_negative.pkl", tensor(stride=(-4, 1)), "non-negative")
    value("size_negative.pkl", tensor(size=(-4, 4)), "non-negative")
    value("size_list.pkl",
          REBUILD + b"(" + storage() + num(0) + b"](K\x02e" + tup(num(1))
          + b"\x89" + ODICT + b"tR", "non-negative")
    value("offset_beyond.pkl", tensor(offset=1), "outside its storage")
    value("offset_negative.pkl", tensor(offset=-1), "wrong arguments")
    value("offset_empty_beyond.pkl", tensor(size=(0,), stride=(1,), offset=17),
          "outside its storage")
    value("expand_bomb.pkl", tensor(size=(2**20, 2**10), stride=(0, 0)),
          "repeats its storage")
    value("rank_nine.pkl", tensor(size=(1,) * 9, stride=(1,) * 9),
          "at most 8")
    value("rank_differs.pkl", tensor(size=(4, 4), stride=(1,)), "at most 8")
    value("hooks.pkl", tensor(hooks=ODICT + uni("a") + b"Ns"),
          "backward hooks")
    value("hooks_none.pkl", tensor(hooks=b"N"), "backward hooks")
    value("metadata.pkl", tensor(more=b"}" + uni("a") + b"Ns"),
          "a tensor with metadata")
    value("grad_number.pkl", tensor(grad=num(1)), "wrong arguments")
    value("rebuild_few.pkl", REBUILD + tup(storage()) + b"R",
          "wrong number of arguments")
    value("rebuild_no_storage.pkl", tensor(store=uni("0")), "wrong arguments")
    value("parameter_of_dict.pkl",
          glob("torch._utils", "_rebuild_parameter")
          + tup(b"}", b"\x88", ODICT) + b"R", "_rebuild_parameter with wrong")


def pickle_good():
    d = "pickle/"
    good(d + "empty_dict.pkl", b"\x80\x02}.")
    good(d + "plain_dict.pkl", b"\x80\x02}" + uni("w") + tensor() + b"s.")
    good(d + "state_dict.pkl", state([("w", tensor())], METADATA))
    good(d + "parameter.pkl",
         state([("w", glob("torch._utils", "_rebuild_parameter")
                 + tup(tensor(), b"\x88", ODICT) + b"R")]))
    good(d + "transposed.pkl", state([("w", tensor(stride=(1, 4)))]))
    good(d + "slice.pkl",
         state([("w", tensor(size=(2, 3), stride=(4, 1), offset=5))]))
    good(d + "scalar.pkl", state([("w", tensor(size=(), stride=()))]))
    good(d + "no_elements.pkl",
         state([("w", tensor(size=(0, 3), stride=(3, 1)))]))
    good(d + "metadata_none.pkl", state([("w", tensor(more=b"N"))]))
    good(d + "tied.pkl",
         b"\x80\x02" + b"}" + b"(" + uni("a") + tensor() + b"q\x00" + uni("b")
         + b"h\x00" + b"u.")
    good(d + "long_memo.pkl",
         b"\x80\x02}(" + uni("a") + tensor() + b"r\0\0\0\0" + uni("b")
         + b"j\0\0\0\0" + b"u.")
    good(d + "two_storages.pkl",
         state([("a", tensor(store=storage("1", "BFloat16Storage", 8),
                             size=(8,), stride=(1,))),
                ("b", tensor())]))
    kinds = ["FloatStorage", "DoubleStorage", "HalfStorage",
             "BFloat16Storage", "ByteStorage", "CharStorage", "ShortStorage",
             "IntStorage", "LongStorage", "BoolStorage",
             "ComplexFloatStorage"]
    good(d + "all_types.pkl",
         state([(k, tensor(store=storage("1", k, 2), size=(2,), stride=(1,)))
                for k in kinds]))


# ---- torch zip archives ------------------------------------------------------

class Zip:
    """Stored zip files with every field open to lies."""

    def __init__(self, prefix=b""):
        self.body = bytearray(prefix)
        self.dir = bytearray()
        self.n = 0

    def add(self, name, data, method=0, flags=0, local_name=None, csize=None,
            usize=None, offset=None, extra=b"", local_method=None):
        name = name if isinstance(name, bytes) else name.encode()
        local = local_name or name
        at = len(self.body) if offset is None else offset
        c = len(data) if csize is None else csize
        u = len(data) if usize is None else usize
        self.body += struct.pack(
            "<IHHHHHIIIHH", 0x04034b50, 20, flags,
            method if local_method is None else local_method, 0, 0,
            zlib.crc32(data), len(data), len(data), len(local), 0) + local + data
        self.dir += struct.pack(
            "<IHHHHHHIIIHHHHHII", 0x02014b50, 20, 20, flags, method, 0, 0,
            zlib.crc32(data), c, u, len(name), len(extra), 0, 0, 0, 0, at) \
            + name + extra
        self.n += 1
        return self

    def end(self, n=None, comment=b""):
        count = self.n if n is None else n
        return bytes(self.body + self.dir) + struct.pack(
            "<IHHHHIIH", 0x06054b50, 0, 0, count, count, len(self.dir),
            len(self.body), len(comment)) + comment


DATA0 = bytes(range(64))
W = state([("w", tensor())], METADATA)


def archive(pkl=W, prefix="m/", byteorder=b"little", skip=(), **kw):
    z = Zip()
    z.add(prefix + "data.pkl", pkl)
    if byteorder is not None:
        z.add(prefix + "byteorder", byteorder)
    if "0" not in skip:
        z.add(prefix + "data/0", DATA0, **kw)
    z.add(prefix + "version", b"3\n")
    return z


def torch_bad():
    d = "torch/"
    ok = archive().end()
    bad(d + "empty_file.bin", b"", "not a torch zip archive")
    bad(d + "text.bin", b"version https://git-lfs.github.com/spec/v1\n",
        "not a torch zip archive")
    bad(d + "legacy_pickle.bin", b"\x80\x02" + b"\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.",
        "legacy torch file (a bare pickle)")
    bad(d + "legacy_tar.bin", bytes(257) + b"ustar\x0000" + bytes(247),
        "legacy torch file (tar)")
    bad(d + "truncated.bin", ok[:-30], "not a zip archive, or cut off")
    bad(d + "only_magic.bin", b"PK\x03\x04", "not a zip archive, or cut off")
    bad(d + "bytes_in_front.bin", b"#!/bin/sh\n" + ok,
        "not a torch zip archive")
    bad(d + "second_end.bin", archive().end(comment=b"PK\x05\x06" + bytes(18)),
        "a damaged zip directory")
    bad(d + "count_lie.bin", archive().end(n=9), "damaged")
    bad(d + "compressed.bin", archive(method=8).end(), "it is compressed")
    bad(d + "size_lie.bin", archive(csize=64, usize=4096).end(),
        "it is compressed")
    bad(d + "beyond_file.bin", archive(csize=1 << 20, usize=1 << 20).end(),
        "local header contradicts")
    bad(d + "encrypted.bin", archive(flags=1).end(), "it is encrypted")
    bad(d + "local_method_differs.bin", archive(local_method=8).end(),
        "local header contradicts")
    bad(d + "offset_beyond.bin", archive(offset=1 << 24).end(),
        "local header contradicts")
    bad(d + "zip64_lie.bin",
        archive(csize=0xffffffff, usize=0xffffffff,
                extra=struct.pack("<HHQQ", 1, 16, 1 << 62, 1 << 62)).end(),
        "local header contradicts")
    bad(d + "duplicate_name.bin", archive().add("m/data/0", bytes(64)).end(),
        "zip entry 'm/data/0': the name occurs twice")
    z = archive()
    at = bytes(z.body).index(b"m/data/0") - 30
    bad(d + "overlap.bin", z.add("m/data/1", DATA0, offset=at,
                                 local_name=b"m/data/1").end(),
        "its bytes overlap another entry's")
    bad(d + "nul_in_name.bin", archive().add(b"m/data/1\0x", b"").end(),
        "its name holds a NUL")
    bad(d + "long_entry_name.bin", archive().add("m/" + "x" * 2000, b"").end(),
        "too long a name")
    bad(d + "no_pickle.bin", Zip().add("m/data/0", DATA0).end(),
        "no data.pkl")
    bad(d + "pickle_too_deep.bin", Zip().add("a/b/data.pkl", W).end(),
        "no data.pkl")
    bad(d + "two_pickles.bin", archive().add("n/data.pkl", W).end(),
        "two data.pkl")
    bad(d + "torchscript.bin", archive().add("m/constants.pkl", b"N.").end(),
        "a TorchScript archive")
    bad(d + "big_endian.bin", archive(byteorder=b"big").end(),
        "byteorder is not little")
    bad(d + "storage_missing.bin", archive(skip=("0",)).end(),
        "storage '0' is not in the file")
    bad(d + "evil_pickle.bin",
        archive(pkl=b"\x80\x02cos\nsystem\n(" + uni("id") + b"tR.").end(),
        "refers to os.system")


def torch_good():
    d = "torch/"
    good(d + "plain.bin", archive().end())
    good(d + "archive_prefix.bin", archive(prefix="archive/").end())
    good(d + "no_byteorder.bin", archive(byteorder=None).end())
    good(d + "transposed.bin",
         archive(pkl=state([("w", tensor(stride=(1, 4)))])).end())
    good(d + "tied.bin", archive(pkl=state(
        [("a", tensor()), ("b", tensor()),
         ("c", tensor(size=(2, 2), stride=(1, 4), offset=3))])).end())
    good(d + "comment.bin", archive().end(comment=b"nothing to see"))


# ---- index and adapter_config ------------------------------------------------

def index_bad():
    d = "index/"

    def wm(name, value, part):
        bad(d + name, json.dumps({"weight_map": value}).encode(), part)

    bad(d + "empty_file.json", b"", "bad JSON at byte 0")
    bad(d + "list.json", b"[]", "not a JSON object")
    bad(d + "no_weight_map.json", b'{"metadata":{}}', "weight_map is missing")
    wm("weight_map_list.json", [], "weight_map is missing or not an object")
    wm("weight_map_empty.json", {}, "weight_map is empty")
    wm("file_number.json", {"a": 3}, "weight_map 'a' is not a file name")
    wm("file_parent.json", {"a": "../x.safetensors"}, "no plain")
    wm("file_absolute.json", {"a": "/etc/x.safetensors"}, "no plain")
    wm("file_nested.json", {"a": "sub/x.safetensors"}, "no plain")
    wm("file_dotdot.json", {"a": ".."}, "no plain")
    wm("file_hidden.json", {"a": ".x.safetensors"}, "no plain")
    wm("file_other_kind.json", {"a": "x.bin"}, "no plain")
    wm("file_only_suffix.json", {"a": ".safetensors"}, "no plain")
    wm("file_backslash.json", {"a": "..\\x.safetensors"}, "no plain")
    wm("file_long.json", {"a": "x" * 300 + ".safetensors"}, "no plain")
    wm("name_empty.json", {"": "x.safetensors"}, "empty or too long")
    bad(d + "file_nul.json",
        b'{"weight_map":{"a":"x.safetensors\\u0000"}}', "bad JSON at byte")
    bad(d + "duplicate.json",
        b'{"weight_map":{"a":"x.safetensors","a":"x.safetensors"}}',
        "duplicate")
    bad(d + "deep.json", b'{"weight_map":' + b"[" * 3000, "nested deeper")


def index_good():
    d = "index/"
    files = ["model-00001-of-00002.safetensors",
             "model-00002-of-00002.safetensors"]
    good(d + "two.json", json.dumps(
        {"metadata": {"total_size": 12},
         "weight_map": {"a": files[0], "b": files[1], "c": files[0]}},
        indent=2).encode())
    good(d + "no_metadata.json",
         json.dumps({"weight_map": {"a": "x.safetensors"}}).encode())


def adapter(**kw):
    c = {"peft_type": "LORA", "r": 4, "lora_alpha": 8,
         "target_modules": ["q_proj"]}
    c.update(kw)
    return json.dumps({k: v for k, v in c.items() if v != "DROP"}).encode()


def adapter_bad():
    d = "adapter/"

    def no(name, part, **kw):
        bad(d + name, adapter(**kw), part, "unsupported")

    def broken(name, part, **kw):
        bad(d + name, adapter(**kw), part)

    no("ia3.json", "peft_type IA3", peft_type="IA3")
    no("adalora.json", "peft_type ADALORA", peft_type="ADALORA")
    for name in ["pissa", "pissa_niter_16", "olora", "corda", "loftq",
                 "lora_ga", "PiSSA", "something_new"]:
        no(f"init_{name}.json" if name != "PiSSA" else "init_pissa_case.json",
           f'init_lora_weights "{name}"', init_lora_weights=name)
    no("bias_some.json", 'bias "some"', bias="some")
    broken("lora_bias_number.json", "lora_bias is no boolean", lora_bias=1)
    broken("saved_numbers.json", "modules_to_save holds no names",
           modules_to_save=[1])
    broken("parameters_map.json", "target_parameters is no list",
           target_parameters={"a": 1})
    broken("tokens_text.json", "trainable_token_indices is no list",
           trainable_token_indices="all")
    broken("tokens_negative.json", "something that is no token id",
           trainable_token_indices={"embed_tokens": [3, -1]})
    no("kasa.json", "KaSA (kasa_config)", kasa_config={"beta": 1})
    no("qalora.json", "QA-LoRA (use_qalora)", use_qalora=True)
    no("bdlora.json", "BD-LoRA (use_bdlora)", use_bdlora={"x": 1})
    no("alora.json", "activated LoRA (alora_invocation_tokens)",
       alora_invocation_tokens=[1, 2])
    no("arrow.json", "Arrow routing (arrow_config)", arrow_config={"top_k": 2})
    no("layer_replication.json", "layer replication (layer_replication)",
       layer_replication=[[0, 4], [2, 5]])
    no("unknown_use.json", "(use_future_variant)", use_future_variant=True)
    no("unknown_config.json", "(future_config)", future_config={"a": 1})
    bad(d + "empty_file.json", b"", "bad JSON at byte 0")
    bad(d + "list.json", b"[]", "not a JSON object")
    bad(d + "duplicate.json", b'{"r":4,"r":8}', "duplicate")
    broken("rank_zero.json", "r is no rank", r=0)
    broken("rank_negative.json", "r is no rank", r=-4)
    broken("rank_float.json", "r is no rank", r=4.5)
    broken("rank_huge.json", "r is no rank", r=1 << 40)
    broken("alpha_string.json", "lora_alpha is no number", lora_alpha="8")
    broken("rslora_number.json", "use_rslora is no boolean", use_rslora=1)
    broken("rank_pattern_list.json", "rank_pattern is no object",
           rank_pattern=[1])
    broken("rank_pattern_zero.json", "rank_pattern 'q_proj' is no rank",
           rank_pattern={"q_proj": 0})
    broken("alpha_pattern_string.json", "alpha_pattern 'q_proj' is no number",
           alpha_pattern={"q_proj": "4"})
    broken("pattern_syntax.json", "is not a regular expression",
           rank_pattern={"q_(proj": 4})
    broken("peft_type_number.json", "peft_type is no string", peft_type=1)
    broken("init_number.json", "init_lora_weights is neither",
           init_lora_weights=3)


def adapter_good():
    d = "adapter/"
    good(d + "plain.json", adapter())
    good(d + "defaults.json", b"{}")
    good(d + "rslora.json", adapter(use_rslora=True, lora_alpha=0.5))
    good(d + "patterns.json",
         adapter(rank_pattern={"layers.0.q_proj": 2, "^model.*k_proj": 6},
                 alpha_pattern={"q_proj": 32}))
    good(d + "dora.json", adapter(use_dora=True, lora_bias=True, bias="all"))
    good(d + "saved.json",
         adapter(modules_to_save=["lm_head"], bias="lora_only",
                 target_modules=".*q_proj", target_parameters=["e.down"]))
    good(d + "tokens.json", adapter(trainable_token_indices=[3, 4]))
    good(d + "tokens_map.json",
         adapter(trainable_token_indices={"embed_tokens": [3]}))
    good(d + "real.json", adapter(
        use_dora=False, lora_bias=False, bias="none", modules_to_save=None,
        target_parameters=None, trainable_token_indices=None,
        kasa_config=None, use_qalora=False, use_bdlora=None,
        alora_invocation_tokens=None, arrow_config=None,
        layer_replication=None, init_lora_weights="gaussian",
        loftq_config={}, megatron_config=None, rank_pattern={},
        fan_in_fan_out=True))


README = {
    "bad": "Hand-made files, one defect each; EXPECT says which error each of "
           "them must\ngive (file, code, part of the message).",
    "good": "Hand-made files that are unusual but right: each of them must "
            "be accepted.",
}


def seeds():
    """What writers really make, as starting points for the fuzzers."""
    top = ROOT / "tests/fuzz/corpus"

    def seed(name, data):
        path = top / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    names = [f"model.layers.{i}.self_attn.{m}_proj.weight"
             for i in (0, 1) for m in "qkvo"]
    seed("fuzz_safetensors/model", st(
        {n: ("BF16", [2, 4], 16 * i, 16 * i + 16)
         for i, n in enumerate(names)}, meta={"format": "pt"}))
    seed("fuzz_index/model", (json.dumps(
        {"metadata": {"total_size": 128},
         "weight_map": {n: f"model-{i % 3 + 1:05}-of-00003.safetensors"
                        for i, n in enumerate(names)}}, indent=2)
        + "\n").encode())
    seed("fuzz_pickle/model", state(
        [(n, tensor(size=(2, 2), stride=(2, 1), offset=i))
         for i, n in enumerate(names)], METADATA))
    seed("fuzz_adapter/peft", json.dumps({
        "alpha_pattern": {}, "auto_mapping": None, "bias": "none",
        "base_model_name_or_path": "base", "fan_in_fan_out": False,
        "init_lora_weights": True, "layer_replication": None,
        "loftq_config": {}, "lora_alpha": 16, "lora_dropout": 0.05,
        "modules_to_save": None, "peft_type": "LORA", "r": 8,
        "rank_pattern": {"layers.(0|1).self_attn.q_proj": 4},
        "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM",
        "use_dora": False, "use_rslora": True}, indent=2).encode())


def main():
    for tree in ("bad", "good"):
        for kind in ("safetensors", "pickle", "torch", "index", "adapter"):
            shutil.rmtree(OUT / tree / kind, ignore_errors=True)
            globals()[f"{kind}_{tree}"]()
        (OUT / tree / "EXPECT").write_text("\n".join(expect[tree]) + "\n")
        (OUT / tree / "README.md").write_text(
            f"# tests/data/{tree}\n\n{README[tree]} Written by "
            "`tools/gen_badfiles.py`;\nread by "
            "`tests/format/test_badfiles.c` and replayed by `tests/fuzz`.\n")
    seeds()


if __name__ == "__main__":
    main()
