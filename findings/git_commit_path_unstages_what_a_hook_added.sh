#!/usr/bin/env bash
# git 2.39.5: what a pre-commit hook stages during `git commit PATH` is in that commit, and the next commit takes it away.
#
# Guess before looking: a hook that formats, generates and `git add`s files works with every form of `git commit`: with a path
# too, what it stages is in the commit, and afterwards everything is clean. Or git refuses the hook's `git add`.
# Seen: `git commit` and `git commit -a` behave as guessed. `git commit -- PATH` gives the hook a second index
# (`.git/next-index-PID.lock`), makes the commit of it, and then puts the first one in place, which has only PATH. So the
# generated file is in the commit, the index says that it is deleted ("D " and "??"), a changed one goes back ("MM"), and the
# next plain `git commit`, of something else, deletes the one and undoes the other, with exit code 0 and without a word.
# Met: a pre-commit hook that stages a directory as a whole, so that no commit has half of a change.
#
# Output seen:
#   git commit            hook's files in the commit: 2, status: clean, the next commit undoes: 0
#   git commit -a         hook's files in the commit: 2, status: clean, the next commit undoes: 0
#   git commit -- one     hook's files in the commit: 2, status: D  generated,MM two,?? generated, the next commit undoes: 2
#   git commit -i one     hook's files in the commit: 2, status: clean, the next commit undoes: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.org
echo "git $(git version | cut -d' ' -f3)"

try() { # NAME GIT-ARGUMENTS...
    local name=$1 there status undone
    shift
    rm -rf "$folder/repository"
    git init -q -b main "$folder/repository"
    cd "$folder/repository"
    echo 1 >one && echo 1 >two && echo 1 >three
    git add . && git commit -q -m base
    cat >.git/hooks/pre-commit <<'HOOK'
#!/bin/sh
echo made >generated
echo made >two
git add generated two
HOOK
    chmod +x .git/hooks/pre-commit
    echo 2 >one
    if [ "$name" = "git commit" ]; then git add one; fi
    git "$@" >"$folder/log"
    rm .git/hooks/pre-commit
    there=$(git show --name-only --format= HEAD | grep -cE '^(generated|two)$')
    status=$(git status --porcelain | paste -sd,)
    echo 2 >three
    git add three
    git commit -q -m "something else"
    undone=$(git show --name-only --format= HEAD | grep -cE '^(generated|two)$' || true)
    printf '%-21s hook'"'"'s files in the commit: %s, status: %s, the next commit undoes: %s\n' \
        "$name" "$there" "${status:-clean}" "$undone"
}

{
    try "git commit" commit -m c
    try "git commit -a" commit -a -m c
    try "git commit -- one" commit -m c -- one
    try "git commit -i one" commit -m c -i one
} | tee "$folder/seen"

diff "$folder/seen" - <<'SEEN'
git commit            hook's files in the commit: 2, status: clean, the next commit undoes: 0
git commit -a         hook's files in the commit: 2, status: clean, the next commit undoes: 0
git commit -- one     hook's files in the commit: 2, status: D  generated,MM two,?? generated, the next commit undoes: 2
git commit -i one     hook's files in the commit: 2, status: clean, the next commit undoes: 0
SEEN
