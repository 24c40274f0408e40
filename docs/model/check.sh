#!/usr/bin/env bash
# Checks the models with spin, every run exhaustively, and prints a table. Fails if a property does not hold, if a
# negative control finds nothing, or if a search did not get to its end. Needs spin and a C compiler; two runs at a time,
# each within 900 MB. --long adds the three largest searches.
set -euo pipefail
cd "$(dirname "$0")"

# expected | model | macros | what the row shows
#   holds    no assertion can fail and no process gets stuck
#   covers   the same, and every statement of the model was executed
#   breaks   spin finds the violation
#   reaches  spin finds the state, so the other rows are not true of nothing
runs() {
    cat <<'TABLE'
covers  | latch    | READERS=1 TX=1 CRASHES=1 GENS=3                        | growth, giving up, a crash anywhere, a successor
holds   | latch    | READERS=2 TX=1 CRASHES=1 GENS=2                        | two readers and all of that but growth
holds   | latch    | READERS=2 TX=2 CRASHES=0 GENS=1                        | two readers, each copy written more than once
holds   | latch    | READERS=1 TX=2 CRASHES=1 GENS=3 NO_GIVE_UP             | changes before and after growth, crash, successor
holds   | latch    | READERS=1 TX=1 CRASHES=2 GENS=3 NO_GIVE_UP             | the successor dies too
holds   | latch    | READERS=1 TX=2 CRASHES=1 GENS=3 X86                    | x86-64 order without any fence: the Python path
holds   | latch    | READERS=1 TX=2 CRASHES=1 GENS=2 ALONE NO_GIVE_UP       | everybody else stops anywhere: the reader finishes
holds   | latch    | READERS=1 TX=1 CRASHES=1 GENS=3 ALONE                  | the same with growth
reaches | latch    | READERS=1 TX=1 CRASHES=1 GENS=3 ALONE MOST_TRIES=1     | it may start over twice, so that bound is exact
reaches | latch    | READERS=1 TX=2 CRASHES=1 GENS=3 REACH_SUCCESSOR        | the last state is read from a successor
reaches | latch    | READERS=1 TX=2 CRASHES=1 GENS=3 REACH_UNACKNOWLEDGED   | a dead writer's last state is read, never acknowledged
breaks  | latch    | READERS=1 NO_RELEASE_STORE ONLY=IS_WHOLE               | publish without release: torn
breaks  | latch    | READERS=1 TX=1 CRASHES=0 NO_RELEASE_STORE ONLY=IS_FOUND| publish without release: no segment behind the word
breaks  | latch    | READERS=1 NO_RELEASE_FENCE ONLY=IS_WHOLE               | no fence behind publish: torn
breaks  | latch    | READERS=1 NO_RELEASE_FENCE ONLY=IS_CURRENT             | no fence behind publish: acknowledged, not yet seen
breaks  | latch    | READERS=1 TX=1 CRASHES=0 NO_RELEASE_FENCE ONLY=IS_FOUND| no fence behind publish: unlinked, still named
breaks  | latch    | READERS=1 NO_ACQUIRE_LOAD ONLY=IS_WHOLE                | data loaded ahead of the version: torn
breaks  | latch    | READERS=1 NO_ACQUIRE_FENCE ONLY=IS_WHOLE               | second look ahead of the data: torn
breaks  | latch    | READERS=1 NO_RECHECK ONLY=IS_WHOLE                     | no second look: torn
breaks  | latch    | READERS=1 X86 NO_RECHECK ONLY=IS_WHOLE                 | no second look: torn on x86-64 as well
breaks  | latch    | READERS=1 NO_SETTLE ONLY=IS_EXACT                      | a copy that misses a transaction
breaks  | latch    | READERS=1 PUBLISH_FIRST ONLY=IS_DURABLE                | published before committed
breaks  | latch    | READERS=1 PUBLISH_FIRST ONLY=IS_CURRENT                | published before committed: time runs backwards
breaks  | latch    | READERS=1 ACKNOWLEDGE_FIRST ONLY=IS_CURRENT            | acknowledged before published
holds   | latch    | READERS=1 TX=2 CRASHES=1 GENS=2 NO_GIVE_UP ADOPT       | a successor adopts the table where it lies
holds   | latch    | READERS=1 TX=1 CRASHES=2 GENS=3 NO_GIVE_UP ADOPT       | and dies in the middle of that
breaks  | latch    | READERS=1 ADOPT NO_REBUILD ONLY=IS_EXACT               | adopted without making the other copy anew
breaks  | latch    | READERS=1 ADOPT NO_COMPARE ONLY=IS_EXACT               | adopted, though the store is ahead of it
covers  | identity | PATIENCE=4                                             | names that are removed and taken by another writer
reaches | identity | REACH_OTHER                                            | a reader gets to that writer's root
breaks  | identity | NO_ID ONLY=IS_WHOLE                                    | another root's segment under the right name
breaks  | identity | NO_LOOK ONLY=IS_FINISHED                               | a dead writer's reader that never looks at the name
holds   | snapshot | TX=3                                                   | a log read while it is appended to and compacted
covers  | snapshot | TX=3 LENGTH=2 GIVE_UPS=1                               | and with transactions that are given up
holds   | snapshot | TX=4 X86                                               | x86-64 order without any fence
holds   | snapshot | TX=3 ALONE                                             | everybody else stops anywhere: the snapshot finishes
reaches | snapshot | TX=3 REACH_OVERTAKEN                                   | a snapshot is good though publishes overtook it
breaks  | snapshot | NO_RELEASE_STORE                                       | publish without release
breaks  | snapshot | NO_RELEASE_FENCE                                       | no fence behind publish
breaks  | snapshot | NO_EPOCH                                               | overwriting without moving the epoch
breaks  | snapshot | NO_EPOCH_FENCE                                         | no fence between the epoch and the overwriting
breaks  | snapshot | NO_ACQUIRE_FENCE                                       | epoch and mark loaded after the second look
breaks  | snapshot | NO_RECHECK                                             | no second look at the version
breaks  | snapshot | NO_LOG_FENCE                                           | second look at the epoch ahead of the log
breaks  | snapshot | NO_EPOCH_CHECK                                         | no second look at the epoch
holds   | seqlock  | TX=2                                                   | one copy: never torn
breaks  | seqlock  | TX=2 ALONE MOST_TRIES=200 ONLY=IS_FINISHED             | one copy: 200 attempts behind a dead writer, no end
TABLE
    [ "$long" = no ] || cat <<'TABLE'
holds   | latch    | READERS=1 TX=3 CRASHES=1 GENS=2 NO_GIVE_UP             | more changes
holds   | latch    | READERS=1 TX=2 CRASHES=1 GENS=3                        | all of that together
holds   | latch    | READERS=2 TX=2 CRASHES=1 GENS=2 NO_GIVE_UP             | two readers, changes before and after a crash
TABLE
}

# One row: translate, compile, search; prints one line and returns whether it came out as expected.
check() {
    local number=$1 expected model macros shows
    IFS='|' read -r expected model macros shows < <(runs | sed -n "${number}p" | sed 's/ *| */|/g')
    local place=$scratch/$number defines=() macro
    for macro in $macros; do defines+=("-D$macro"); done
    # A violation is found in no time, so compiling for speed would only cost some.
    local optimise=-O0
    [ "$expected" = reaches ] || [ "$expected" = breaks ] || optimise=-O1
    mkdir "$place"
    (
        cd "$place"
        spin "${defines[@]}" -a "$models/$model.pml" &&
            cc $optimise -w -DSAFETY -DCOLLAPSE -DMEMLIM=900 -o pan pan.c
    ) >"$place/build" 2>&1 || { sed 's/^/    /' "$place/build"; printf 'FAILED %s %s: does not build\n' "$model" "$macros"; return 1; }
    (cd "$place" && ./pan -m200000) >"$place/out" 2>&1 || true

    local found=no states seconds verdict=ok
    grep -q 'assertion violated' "$place/out" && found=yes
    states=$(awk '/states, stored/ {print $1; exit}' "$place/out")
    seconds=$(awk '/elapsed time/ {print $4; exit}' "$place/out")
    if [ "$expected" = holds ] || [ "$expected" = covers ]; then
        grep -q 'errors: 0$' "$place/out" || verdict="FAILED: $(grep -m1 '^pan:' "$place/out" || echo 'no result')"
        grep -qE 'not completed|too small|out of memory|MEMLIM|aborting' "$place/out" && verdict='FAILED: the search was cut short'
        [ "$expected" = holds ] || ! grep -E '^\s.*, state [0-9]+, ' "$place/out" | grep -qv '"-end-"' ||
            verdict='FAILED: statements that were never executed'
    elif [ "$found" = no ]; then
        verdict='FAILED: spin found nothing'
    fi
    printf '%-8s %-9s %-55s %11s %6s s  %s: %s\n' \
        "$expected" "$model" "$macros" "${states:-?}" "${seconds:-?}" "$verdict" "$shows"
    [ "$verdict" = ok ] || { grep -vE '^$|^\s' "$place/out" | head -20 | sed 's/^/    /'; return 1; }
    rm -r "$place"
}

for tool in spin cc; do
    command -v "$tool" >/dev/null || { echo "check.sh needs $tool (Debian: apt-get install spin gcc)" >&2; exit 2; }
done
long=no
[ "${1:-}" != --long ] || long=yes
models=$PWD
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export long models scratch
export -f runs check

printf '%-8s %-9s %-55s %11s %8s  %s\n' expected model macros states time result
seq "$(runs | wc -l)" | xargs -P 2 -I{} bash -c 'set -uo pipefail; check {}' || { echo 'the model does not hold as expected' >&2; exit 1; }
echo 'all as expected'
