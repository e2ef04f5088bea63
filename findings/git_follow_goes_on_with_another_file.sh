#!/usr/bin/env bash
# git 2.39.5: `git log --follow FILE` goes on, at the commit that made the file, with the history of a similar file that is still there.
#
# Guess before looking: it "continues the history of a file beyond renames", and a rename takes the old name away. A new document that looks
# like another one, which stays, was not renamed: its history begins with its creation, as without `--follow`.
# Seen: at the creation it looks for copies too, in all files of the commit before, also in those that this commit did not change. A document of
# the same shape is enough; from there on the other file's commits are told as its own. `log.follow` does the same to `git log FILE`. A document of another shape
# is left alone. `git blame` has the lines right.
# Met: the history of agents whose documents come from one template: the youngest had the life of the eldest before its own.
#
# Output seen:
#   agents/bob.json         bob works, bob is created
#   … with --follow         bob works, bob is created, alice works, alice is created
#   … with log.follow       bob works, bob is created, alice works, alice is created
#   agents/eve.json, another shape, --follow: eve is created
#   blame of agents/bob.json: bob is created, bob works
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.org
echo "git $(git version | cut -d' ' -f3)"
git init -q -b main "$folder/repository"
cd "$folder/repository"
mkdir agents

agent() { # NAME COUNT
    printf '{\n  "agent_id": "%s",\n  "status": "idle",\n  "model": "small",\n  "tools": ["search", "write"],\n  "count": %s\n}\n' "$1" "$2"
}
commit() {
    git add -A
    git commit -q -m "$1"
}
told() { paste -sd, - | sed 's/,/, /g'; }

agent alice 0 >agents/alice.json
commit "alice is created"
agent alice 1 >agents/alice.json
commit "alice works"
printf 'nothing here\nlooks like\nan agent\n' >agents/eve.json
commit "eve is created"
agent bob 0 >agents/bob.json
commit "bob is created"
agent bob 5 >agents/bob.json
commit "bob works"

plain=$(git log --format=%s -- agents/bob.json | told)
followed=$(git log --follow --format=%s -- agents/bob.json | told)
configured=$(git -c log.follow=true log --format=%s -- agents/bob.json | told)
eve=$(git log --follow --format=%s -- agents/eve.json | told)
blamed=$(git blame --line-porcelain agents/bob.json | sed -n 's/^summary //p' | sort -u | told)
echo "agents/bob.json         $plain"
echo "… with --follow         $followed"
echo "… with log.follow       $configured"
echo "agents/eve.json, another shape, --follow: $eve"
echo "blame of agents/bob.json: $blamed"
test -e agents/alice.json
test "$plain" = "bob works, bob is created"
test "$followed" = "bob works, bob is created, alice works, alice is created"
test "$configured" = "$followed"
test "$eve" = "eve is created"
test "$blamed" = "bob is created, bob works"
