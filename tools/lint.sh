#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Checks what compilers do not: format (clang-format 14), shell scripts
# (shellcheck), and the house rules of tools/lint_rules.py. A tool that is not
# installed is skipped with a note; the rules always run.
#
#   tools/lint.sh [FILE...]     all files that git knows or would add by default
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

files=()
if [ $# -gt 0 ]; then
    files=("$@")
elif git rev-parse --is-inside-work-tree >/dev/null 2>&1; then
    while IFS= read -r -d '' file; do
        [ ! -f "$file" ] || files+=("$file")
    done < <(git ls-files -z --cached --others --exclude-standard)
else
    # An unpacked archive: everything but build directories.
    while IFS= read -r -d '' file; do
        files+=("${file#./}")
    done < <(find . -path './build*' -prune -o -path './.*' -prune -o \
        -type f -print0)
fi

sources=()
scripts=()
for file in ${files[@]+"${files[@]}"}; do
    case $file in
    *.c | *.h) sources+=("$file") ;;
    tests/data/*) ;;
    *.sh) scripts+=("$file") ;;
    *)
        if head -c 64 -- "$file" | head -n 1 | tr -d '\0' |
            grep -qE '^#!.*\b(ba)?sh\b'; then
            scripts+=("$file")
        fi
        ;;
    esac
done

failed=0
if clang-format --version 2>/dev/null | grep -q 'version 14\.'; then
    unformatted=
    if [ ${#sources[@]} -gt 0 ]; then
        unformatted=$(clang-format --dry-run -- "${sources[@]}" 2>&1 |
            awk -F: '/-Wclang-format-violations/ { n[$1]++ }
                END { for (f in n) print f ": " n[f] " places" }' | sort)
    fi
    if [ -n "$unformatted" ]; then
        echo "$unformatted" >&2
        echo "lint: run clang-format -i on these files" >&2
        failed=1
    fi
else
    echo "lint: no clang-format 14, format not checked" >&2
fi
if command -v shellcheck >/dev/null 2>&1; then
    if [ ${#scripts[@]} -gt 0 ] && ! shellcheck -- "${scripts[@]}" >&2; then
        failed=1
    fi
else
    echo "lint: no shellcheck, shell scripts not checked" >&2
fi
python3 tools/lint_rules.py ${files[@]+"${files[@]}"} || failed=1
[ "$failed" -eq 0 ] || exit 1
echo "lint: ${#files[@]} files, nothing found"
