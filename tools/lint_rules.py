# SPDX-License-Identifier: Apache-2.0
"""House rules that a compiler does not know; called by tools/lint.sh.

Each C rule is a pattern and the places where it may occur. Patterns are
looked for in code: comments and the insides of strings are blanked first. A
line with `lint-ok: REASON` in a comment is not looked at.
"""

import os
import re
import sys

# A call of one of these names, not a member (x.free, x->free) or a part of a
# longer name.
def call(*names):
    return r"(?<![\w.>])(?:" + "|".join(names) + r")\s*\("


def include(name):
    return r"^\s*#\s*include\s*[\"<]" + name + r"\.h"


OUTSIDE_LIBRARIES = r"^(cli|tests|tools)/"
PRINTERS = r"^(cli/print\.[ch]|cli/main_\w+\.c|tests/|tools/)"

# (pattern, regex of paths that are exempt, message)
CODE_RULES = [
    (call("sprintf", "vsprintf", "strcpy", "strcat", "gets", "atoi", "atol",
          "atof", "strtok", "alloca"), None,
     "banned function: it knows no bounds or reports no errors"),
    (call("malloc", "calloc", "realloc", "reallocarray", "free", "strdup",
          "strndup", "asprintf", "vasprintf", "aligned_alloc",
          "posix_memalign"),
     r"^(store/base/alloc\.c|tests/|tools/)",
     "the heap only via tv_alloc and tv_free"),
    (call("exit", "abort", "quick_exit"), OUTSIDE_LIBRARIES,
     "libraries never end the program"),
    (call("printf", "vprintf", "puts", "putchar", "perror") +
     r"|\b(?:stdout|stderr)\b", PRINTERS,
     "only cli/print.c and main files write to the terminal"),
    (r"^\s*#\s*include\s*[\"<](?:[^\">]*/)?\.\./", None,
     "no ../ in includes: link the target instead"),
    (r"\bmdb_(?:env|txn|dbi|get|put|del|cursor|stat|drop|d?cmp|reader|set|"
     r"version|strerror)\w*\s*\(|^\s*#\s*include\s*[\"<]lmdb\.h",
     r"^(store/lmdb_seam\.[ch]|tests/|tools/)",
     "LMDB is called only in store/lmdb_seam"),
    (r"\bMDB_\w+", r"^(store/\w+\.[ch]|tests/|tools/)",
     "LMDB's types only in store"),
    (r"\broaring_\w+|^\s*#\s*include\s*[\"<]roaring/",
     r"^(store/mask\w*\.[ch]|tests/|tools/)",
     "CRoaring only in store/mask*"),
    (include("jansson"),
     r"^(store/(format|model)|adapt|merge|cli|eval|tests|tools)/",
     "jansson only where JSON is read or written"),
    (include("xxhash"), r"^(store/\w+\.[ch]|tests/|tools/)",
     "xxHash only in store"),
    (include("unzip"), r"^(store/format|tests|tools)/",
     "minizip only in store/format"),
    (include("yaml"), r"^(merge|tests|tools)/", "libyaml only in merge"),
    (r"^\s*#\s*include\s*<\w*intrin\.h>", r"^kernels/x86/",
     "intrinsics only in kernels/x86"),
    (r"^\s*#\s*include\s*<cmocka\.h>", r"^tests/", "cmocka only in tests"),
    (r"^\s*#\s*(?:if|ifdef|elif)\b.*__AVX", r"^kernels/x86/",
     "no feature tests of the compiler outside kernels/x86"),
]

# In every text file, comments and strings included. The letters in brackets
# keep the rule from finding itself.
MARKER = re.compile(r"\b(?:T[O]DO|FIX[M]E|X[X]X|HA[C]K)\b")
PLACE = re.compile(r"(?<![\w./$}])/(?:work|root|home|tmp|Users)(?:/|\b)")

C_SPDX = "/* SPDX-License-Identifier: Apache-2.0 */"
SPDX = "SPDX-License-Identifier: Apache-2.0"
WAIVER = "lint-ok:"

TOKEN = re.compile(
    r"/\*.*?\*/|//[^\n]*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'", re.S)


def code_only(text):
    """The text with comments and strings blanked, line for line."""

    def blank(match):
        token = match.group(0)
        if token[0] in "\"'":
            return token[0] + " " * (len(token) - 2) + token[-1]
        return re.sub(r"[^\n]", " ", token)

    # The names of included files are strings to C, and rules look at them.
    lines = text.split("\n")
    kept = {i: line for i, line in enumerate(lines)
            if re.match(r"\s*#\s*include\b", line)}
    blanked = TOKEN.sub(blank, text).split("\n")
    for i, line in kept.items():
        blanked[i] = line
    return blanked


def check_c(path, text, report):
    lines = text.split("\n")
    if lines[0] != C_SPDX:
        report(1, "the first line must be " + C_SPDX)
    elif len(lines) < 2 or not lines[1].startswith("/*"):
        report(2, "a comment that says what the file is must follow")
    code = code_only(text)
    for pattern, exempt, message in CODE_RULES:
        if exempt and re.search(exempt, path):
            continue
        for number, line in enumerate(code, 1):
            if (re.search(pattern, line) and
                    WAIVER not in lines[number - 1]):
                report(number, message + ": " + lines[number - 1].strip())


def is_script(path, text):
    return path.endswith((".sh", ".py")) or text.startswith("#!")


def check_file(path, report):
    try:
        with open(path, encoding="utf-8") as f:
            text = f.read()
    except UnicodeDecodeError:
        if path.endswith((".c", ".h", ".sh", ".py", ".md", ".txt", ".cmake")):
            report(1, "not UTF-8")
        return
    if path.startswith("tests/data/") or "/corpus/" in path:
        return
    is_c = path.endswith((".c", ".h"))
    if is_c:
        check_c(path, text, report)
    elif is_script(path, text) and not any(
            SPDX in line for line in text.split("\n")[:3]):
        report(1, "no SPDX line in the first three")
    is_code = is_c or is_script(path, text) or path.endswith(
        (".cmake", ".json", "CMakeLists.txt"))
    for number, line in enumerate(text.split("\n"), 1):
        if WAIVER in line:
            continue
        if MARKER.search(line):
            report(number, "unfinished work is not left in files: " +
                   line.strip())
        if is_code and PLACE.search(line):
            report(number, "a path of one machine: " + line.strip())
        if is_code and line != line.rstrip():
            report(number, "blanks at the end of the line")
    if is_code and text and not text.endswith("\n"):
        report(text.count("\n") + 1, "no newline at the end")


def main():
    problems = []
    places = {}
    for path in sys.argv[1:]:
        check_file(path, lambda number, message, path=path: problems.append(
            f"{path}:{number}: {message}"))
        if path.endswith((".c", ".h")):
            places.setdefault(os.path.basename(path), []).append(path)
    for paths in places.values():
        if len(paths) > 1:
            problems.append(f"{paths[0]}: file names are unique in the tree: "
                            + ", ".join(paths[1:]))
    for problem in problems:
        print(problem, file=sys.stderr)
    return 1 if problems else 0


sys.exit(main())
