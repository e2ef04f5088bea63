#!/usr/bin/env bash
# git 2.39.5: `git stash` in a merge that is resolved and not yet committed ends the merge; `git stash pop` does not bring it back.
#
# Guess before looking: a stash puts the work aside and `pop` brings all of it back; or git refuses it in a merge, as it
# refuses `git checkout`, another merge, and `git commit PATH` ("cannot do a partial commit during a merge").
# Seen: while a path is unmerged it is refused. Once all are resolved it is taken, with exit code 0 and no warning: MERGE_HEAD is
# gone, `pop` brings the files back without it, and `git commit` makes an ordinary commit with one parent. The branch has
# the other's changes and counts as not merged: the next merge of it starts from the old base, and asks about the same conflict
# again. In a cherry-pick and a revert CHERRY_PICK_HEAD and REVERT_HEAD go in the same way; a rebase stays.
# Met: a merge of state that was resolved, while a local change had to be put aside before its commit.
#
# Output seen:
#   merge:       with a path unmerged: refused; resolved: stashed, MERGE_HEAD gone, after the pop gone
#   parents of the commit: 1; `other` is merged: no; merging it again: CONFLICT
#   cherry-pick: resolved: stashed, CHERRY_PICK_HEAD gone, after the pop gone
#   revert:      resolved: stashed, REVERT_HEAD gone, after the pop gone
#   rebase:      resolved: stashed, rebase-merge there, after the pop there
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
export GIT_CONFIG_GLOBAL=/dev/null GIT_CONFIG_NOSYSTEM=1 GIT_EDITOR=true
export GIT_AUTHOR_NAME=a GIT_AUTHOR_EMAIL=a@example.org GIT_COMMITTER_NAME=a GIT_COMMITTER_EMAIL=a@example.org
echo "git $(git version | cut -d' ' -f3)"

begin() { # two branches that changed the same line; `main` is checked out
    rm -rf "$folder/repository"
    git init -q -b main "$folder/repository"
    cd "$folder/repository"
    echo base >one
    git add . && git commit -q -m base
    git checkout -q -b other && echo other >one && git commit -qam other
    git checkout -q main && echo main >one && git commit -qam main
}
state() { if [ -e ".git/$1" ]; then echo there; else echo gone; fi; }

stash() { # what git keeps of the operation
    local after
    echo resolved >one
    git add one
    git stash >"$folder/log" 2>&1
    after=$(state "$1")
    git stash pop >"$folder/log" 2>&1
    echo "resolved: stashed, $1 $after, after the pop $(state "$1")"
}

{
    begin
    if git merge other >"$folder/log"; then exit 1; fi
    if git stash >"$folder/log" 2>&1; then unmerged=taken; else unmerged=refused; fi
    echo "merge:       with a path unmerged: $unmerged; $(stash MERGE_HEAD)"
    git commit -qam "the merge, as it seems"
    parents=$(git show -s --format=%P | wc -w)
    if git merge-base --is-ancestor other main; then merged=yes; else merged=no; fi
    again=$(git merge other | grep -o '^CONFLICT' || true)
    echo "parents of the commit: $parents; \`other\` is merged: $merged; merging it again: $again"
    begin
    if git cherry-pick other >"$folder/log" 2>&1; then exit 1; fi
    echo "cherry-pick: $(stash CHERRY_PICK_HEAD)"
    begin
    git commit -q --allow-empty -m later && echo later >one && git commit -qam later
    if git revert --no-edit HEAD~2 >"$folder/log" 2>&1; then exit 1; fi
    echo "revert:      $(stash REVERT_HEAD)"
    begin
    if git rebase other >"$folder/log" 2>&1; then exit 1; fi
    echo "rebase:      $(stash rebase-merge)"
} | tee "$folder/seen"

diff "$folder/seen" - <<'SEEN'
merge:       with a path unmerged: refused; resolved: stashed, MERGE_HEAD gone, after the pop gone
parents of the commit: 1; `other` is merged: no; merging it again: CONFLICT
cherry-pick: resolved: stashed, CHERRY_PICK_HEAD gone, after the pop gone
revert:      resolved: stashed, REVERT_HEAD gone, after the pop gone
rebase:      resolved: stashed, rebase-merge there, after the pop there
SEEN
