// What must hold over the years: a restore that is killed, a clock that leaps, a disk that is away for weeks, a disk
// that is mounted when it is touched.

import { describe, expect, test } from "bun:test";
import { spawn } from "node:child_process";
import { existsSync, mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  contentsDigest,
  events,
  expectRun,
  expectSound,
  filesystem,
  mountImage,
  nextSecond,
  pair,
  pathWith,
  run,
  sh,
  transfers,
} from "./support/rig.ts";
import {
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  unmount,
  waitFor,
  type Result,
} from "./support/rig.ts";
import { seeded, soak } from "./support/random.ts";

const warnings = (result: Result) =>
  events(result).filter(({ event, message }) => event === "warning" && /clock/.test(message));

describe("restore --replace can be killed at any moment", () => {
  /** A source with snapshots of its own, one that was received, some of them backed up; `anew` brings all back as it was. */
  async function replaceable() {
    const { source, snapshots, destination, a, b } = pair();
    for (const n of [1, 2]) snapshotAs(source, `2026010${n}-000000`);
    await expectRun(0, ["-S", source, destination]);
    sh(`btrfs -q subvolume delete "$1"/* "$2" >/dev/null`, snapshots, source);
    await expectRun(0, ["restore", destination, source]);
    for (const n of [3, 4, 5, 6]) {
      writeFileSync(join(source, "state"), String(n));
      snapshotAs(source, `2026010${n}-000000`);
    }
    await expectRun(0, ["-S", source, destination]);
    for (const n of [7, 8, 9]) {
      writeFileSync(join(source, "state"), String(n));
      snapshotAs(source, `2026010${n}-000000`);
    }
    writeFileSync(join(source, "state"), "not backed up");
    const standing = subvolumes(snapshots);
    expect([
      standing.size,
      [...standing.values()].filter(({ receivedUuid }) => receivedUuid !== null).length,
    ]).toEqual([8, 1]);
    const [old, restored] = [contentsDigest(source), contentsDigest(join(snapshots, CHOSEN))];
    for (const { path, image } of [a, b])
      sh(
        `sync -f "$1"; umount "$1"; cp --sparse=always "$2" "$2.first"; mount -o loop,noatime "$2" "$1"`,
        path,
        image,
      );
    const anew = () => {
      for (const { path, image, uuid } of [a, b])
        sh(
          `umount "$1"; for i in $(seq 600); do [ -e "/sys/fs/btrfs/$3" ] || break; sleep 0.05; done
          cp --sparse=always "$2.first" "$2"; mount -o loop,noatime "$2" "$1"`,
          path,
          image,
          uuid,
        );
    };
    /** What is not as it should be after a kill, and after what was run next. */
    const wrongs = (): string[] => {
      const wrong: string[] = [];
      if (!existsSync(snapshots)) wrong.push(`${snapshots} is not there`);
      const now = existsSync(snapshots) ? subvolumes(snapshots) : new Map<string, never>();
      for (const [name, { uuid, receivedUuid }] of standing) {
        const one = now.get(name);
        if (one === undefined) wrong.push(`${name} is not there`);
        else if (!one.readonly) wrong.push(`${name} is writable`);
        else if (one.uuid !== uuid && (receivedUuid === null || one.receivedUuid !== receivedUuid))
          wrong.push(`${name} is no longer itself`);
      }
      const kept = readdirSync(a.path).filter((name) => name.startsWith("home.before-"));
      for (const folder of kept.map((name) => join(a.path, name, "snapshot")))
        if (existsSync(folder))
          wrong.push(...[...subvolumes(folder).keys()].map((name) => `${folder} has ${name}`));
      const [right, when] = kept.length > 0 ? [restored, "in the snapshot"] : [old, "before"];
      if (existsSync(source) && contentsDigest(source) !== right)
        wrong.push(`${source} is not what it was ${when}`);
      return wrong;
    };
    /** The next command, and after a restore the next run; what they leave. */
    const goOn = async (next: "run" | "restore"): Promise<string[]> => {
      const wrong: string[] = [];
      if (next === "restore") {
        await nextSecond(); // what is kept beside TARGET has the time in its name
        const again = await run(RESTORE(source));
        if (again.status !== 0) wrong.push(`restore: exit ${again.status}: ${again.stderr}`);
        else wrong.push(...wrongs().map((problem) => `restore: ${problem}`));
      }
      const after = await run(["--json", source, destination]);
      if (after.status !== 0) wrong.push(`run: exit ${after.status}: ${after.stderr}`);
      const sent = transfers(after);
      // The restored one is held there already, and so is every parent.
      if (sent.length === 0 || sent.some(({ parent }) => parent === null))
        wrong.push(`run: sent ${JSON.stringify(sent)}`);
      return [...wrong, ...wrongs()];
    };
    const working = `btrfs-backup[:].*(${a.path}|${b.path})|^btrfs (send|receive) `;
    const ended = () =>
      waitFor("its children to end", () => sh(`pgrep -f "$1" || :`, working) === "");
    return { source, snapshots, destination, a, b, restored, standing, anew, goOn, ended };
  }

  const CHOSEN = "20260108-000000";
  const RESTORE = (source: string) => [
    "restore",
    "--replace",
    "--snapshot",
    CHOSEN,
    source,
    source,
  ];

  /**
   * A `btrfs` and an `mv` that count the steps of a restore once it changes anything that stands, in `steps`; at the one
   * that `end` says, they do not take it: with "all" they kill who called them up to the program, with "verb" only the verb.
   */
  function counting() {
    const tools = temporaryDirectory();
    for (const name of ["btrfs", "mv"])
      writeFileSync(
        join(tools, name),
        `#!/bin/bash
        case "${name} $*" in
          "mv "*home*|"btrfs property set "*" ro false"|"btrfs property set "*" ro true"|"btrfs filesystem sync "*) ;;
          "btrfs "*"subvolume snapshot "*|"btrfs "*"subvolume delete "*) ;;
          *) exec ${sh(`command -v ${name}`)} "$@" ;;
        esac
        if [ -e ${tools}/steps ] || { case "${name} $*" in "mv "*|*" ro false") true ;; *) false ;; esac; }; then
          echo "${name} $*" >>${tools}/steps
          read -r how at <${tools}/end || :
          if [ "$(wc -l <${tools}/steps)" = "$at" ]; then
            chain=
            one=$PPID
            while [ "$one" -gt 1 ] && [ "$one" != ${process.pid} ]; do
              chain="$one $chain"
              read -r stat <"/proc/$one/stat"
              set -- \${stat##*) }
              one=$2
            done
            set -- $chain
            if [ "$how" = verb ]; then kill -KILL "$PPID"; else kill -KILL -- "-$1"; kill -KILL "$@"; fi
            exit 1
          fi
        fi
        exec ${sh(`command -v ${name}`)} "$@"
        `.replace(/^ {8}/gm, ""),
        { mode: 0o755 },
      );
    const steps = () =>
      existsSync(join(tools, "steps"))
        ? readFileSync(join(tools, "steps"), "utf8").trimEnd().split("\n")
        : [];
    const end = (how: "all" | "verb" | "none", at: number) => {
      sh(`rm -f "$1/steps"`, tools);
      writeFileSync(join(tools, "end"), `${how} ${at}\n`);
    };
    return { env: pathWith(tools), steps, end };
  }

  for (const next of ["run", "restore"] as const)
    test(`killed before each of its steps, the next ${next} finishes it: no snapshot is lost, writable or in two places`, async () => {
      const { source, anew, goOn, ended } = await replaceable();
      const { env, steps, end } = counting();
      end("none", 0);
      await expectRun(0, RESTORE(source), { env });
      const all = steps();
      const wrong: Record<string, string[]> = {};
      for (const [i, step] of all.entries()) {
        // Every step is somebody's turn; with SOAK, each is both's.
        if (process.env["SOAK"] === undefined && i % 2 === Number(next === "run")) continue;
        anew();
        end("all", i + 1);
        const killed = await start(RESTORE(source), { env, group: true }).finished;
        await ended();
        const problems = [
          ...(killed.signal === "SIGKILL" ? [] : [`not killed: ${killed.stderr}`]),
          ...(await goOn(next)),
        ];
        if (problems.length > 0) wrong[`before step ${i + 1}: ${step}`] = problems;
      }
      console.log(`${all.length} steps`);
      expect(all.length).toBeGreaterThan(10);
      expect(wrong).toEqual({});
    }, 600_000);

  test("kill -9 of everything at random moments: the next run goes on as if nothing had been", async () => {
    const { source, anew, goOn, ended, a } = await replaceable();
    const random = seeded();
    const began = Date.now();
    await expectRun(0, RESTORE(source));
    const takes = Date.now() - began;
    const wrong: Record<string, string[]> = {};
    let inTheMiddle = 0;
    for (let i = 0; i < soak(8); i++) {
      anew();
      const running = start(RESTORE(source), { group: true });
      // Most of the time goes by before anything moves.
      const moment = takes * (0.4 + 0.6 * random());
      await Promise.race([running.finished, Bun.sleep(moment)]);
      if (running.child.exitCode === null) {
        inTheMiddle++;
        process.kill(-running.pid, "SIGKILL");
        sh(
          `for p in $(pgrep -f "btrfs-backup[:].*$1"); do kill -KILL "$p" 2>/dev/null || :; done`,
          a.path,
        );
      }
      await running.finished;
      await ended();
      const problems = await goOn(i % 2 === 0 ? "run" : "restore");
      if (problems.length > 0) wrong[`${i}: after ${moment} ms`] = problems;
    }
    console.log(`${inTheMiddle} kills in the middle of a restore`);
    expect(wrong).toEqual({});
  }, 300_000);

  test("from backups elsewhere, too: killed between the two names that change, TARGET is there for the next run", async () => {
    const { source, destination, anew, ended } = await replaceable();
    const { env, steps, end } = counting();
    const args = ["restore", "--replace", destination, source];
    end("none", 0);
    await expectRun(0, args, { env });
    const moves = steps().flatMap((step, i) => (step.startsWith("mv ") ? [i + 1] : []));
    expect(moves.length).toBeGreaterThan(0);
    const wrong: Record<string, string> = {};
    for (const step of moves) {
      anew();
      end("all", step);
      expect((await start(args, { env, group: true }).finished).signal).toBe("SIGKILL");
      await ended();
      const { status, stderr } = await run(["--json", source, destination]);
      if (status !== 0) wrong[`before step ${step}`] = stderr;
    }
    expect(wrong).toEqual({});
  }, 120_000);

  test("when only the move fails, the message says that TARGET is restored, and where the snapshots are", async () => {
    const { source, snapshots, a, restored, standing, anew, goOn } = await replaceable();
    const { env, steps, end } = counting();
    end("none", 0);
    await expectRun(0, RESTORE(source), { env });
    const moves = steps().flatMap((step, i) => (step.startsWith("mv ") ? [i + 1] : []));
    anew();
    end("verb", moves[4] as number);
    const failed = await expectRun(1, RESTORE(source), { env });
    expect(contentsDigest(source)).toBe(restored);
    const before = readdirSync(a.path).find((name) => name.startsWith("home.before-")) ?? "";
    expect(failed.stderr).toMatch(/is restored/);
    expect(failed.stderr).toContain(join(a.path, before));
    const there = [...subvolumes(join(a.path, before, "snapshot")).keys()];
    expect([...there, ...subvolumes(snapshots).keys()].sort()).toEqual([...standing.keys()].sort());
    expect(await goOn("run")).toEqual([]);
  }, 120_000);

  test("a snapshot whose name is taken in the new folder stays in the old one, is named, and stays read-only", async () => {
    const { source, snapshots, a } = pair();
    sh(`mkdir -p "$1/20260101-000000"; echo x >"$1/20260101-000000/in the way"`, snapshots);
    snapshotAs(source, "20260102-000000");
    sh(`rm -r "$1/20260101-000000"`, snapshots);
    for (const name of ["20260101-000000", "20260103-000000"]) snapshotAs(source, name);
    const { stderr } = await expectRun(1, [
      "restore",
      "--replace",
      "--snapshot",
      "20260102-000000",
      source,
      source,
    ]);
    const old = join(
      a.path,
      readdirSync(a.path).find((name) => name.startsWith("home.before-")) ?? "",
      "snapshot",
    );
    expect(stderr).toMatch(/is restored/);
    expect(stderr).toMatch(
      new RegExp(`could not move from ${old.replace("/snapshot", "")}.*20260101-000000`),
    );
    expect([...subvolumes(old)]).toMatchObject([["20260101-000000", { readonly: true }]]);
    expect([...subvolumes(snapshots)]).toMatchObject([
      ["20260102-000000", { readonly: true }],
      ["20260103-000000", { readonly: true }],
    ]);
    expect(readFileSync(join(snapshots, "20260101-000000", "in the way"), "utf8")).toBe("x\n");
    // Nothing stands in two places, so the next run goes on.
    await expectRun(0, [source]);
  });
});

// What the program takes for the time: its own clock is set, all others are right.
const clock = join(temporaryDirectory(), "clock.ts");
writeFileSync(
  clock,
  `const Real = Date;
  const offset = Real.parse(process.env.CLOCK) - Real.now();
  globalThis.Date = class extends Real {
    constructor(...words) {
      if (words.length === 0) super(Real.now() + offset);
      else super(...words);
    }
    static now() {
      return Real.now() + offset;
    }
  };`,
);
/** The clock shows that UTC time when the program starts. */
const at = (utc: string, env: Record<string, string> = {}) => ({
  env: { TZ: "UTC", CLOCK: `${utc}Z`, BUN_OPTIONS: `--preload=${clock}`, ...env },
});

const DAY = 86400e3;
const nameAt = (moment: number) =>
  new Date(moment).toISOString().slice(0, 19).replaceAll(/[-:]/g, "").replace("T", "-");
/** Names `count` times, `days` apart, the last one at that UTC time. */
const every = (days: number, count: number, last: string) =>
  Array.from({ length: count }, (_, i) =>
    nameAt(Date.parse(`${last}Z`) - (count - 1 - i) * days * DAY),
  );

describe("a clock that leaps deletes nothing", () => {
  /** A source and a destination with snapshots by these names. */
  async function habit(names: string[], last: string) {
    const { source, snapshots, destination } = pair();
    for (const name of names) snapshotAs(source, name);
    await expectRun(0, ["-S", source, destination], at(last));
    const standing = () => [snapshotNames(snapshots).sort(), snapshotNames(destination).sort()];
    expect(standing()).toEqual([names, names]);
    const runAt = async (utc: string, policy: string, ...more: string[]) => {
      const result = await expectRun(
        0,
        ["--json", "-N", policy, "-n", policy, ...more, source, destination],
        at(utc),
      );
      const name = events(result).find(({ event }) => event === "snapshot")?.["name"] as string;
      expect(transfers(result)).toMatchObject([{ name }]);
      expect(name.slice(0, 8)).toBe(utc.slice(0, 10).replaceAll("-", ""));
      return { ...result, name };
    };
    return { source, snapshots, destination, standing, runAt };
  }
  const january = every(1, 31, "2025-01-31T03:00:00");
  const afterJanuary = () => habit(january, "2025-01-31T03:00:10");
  const both = (names: readonly string[]) => [names.toSorted(), names.toSorted()];
  /** It says why nothing was deleted: once to people, once to programs, of each side. */
  const expectWarned = (result: Result) => {
    expect(result.stderr).toMatch(/clock/);
    expect(warnings(result).length).toBeGreaterThan(0);
  };

  test("a year ahead, and back again: both sides keep all that they had, and after three days go on as before", async () => {
    const { standing, runAt } = await afterJanuary();
    const ahead = await runAt("2026-02-01T04:00:00", "14d+");
    expect(standing()).toEqual(both([...january, ahead.name]));
    expectWarned(ahead);
    const taken = [ahead.name];
    for (const day of ["2025-02-01", "2025-02-02"]) {
      const back = await runAt(`${day}T04:00:00`, "14d+");
      taken.push(back.name);
      expect(standing()).toEqual(both([...january, ...taken]));
      expectWarned(back);
    }
    const third = await runAt("2025-02-03T04:00:00", "14d+");
    // 14 days before it, and what is dated after it.
    expect(standing()).toEqual(both([...january.slice(20), ...taken, third.name]));
  });

  test("a year ahead for good: it goes on after three days, and the newest three from before are still there then", async () => {
    const { standing, runAt } = await afterJanuary();
    const taken: string[] = [];
    for (const day of ["2026-02-01T04:00:00", "2026-02-01T16:00:00", "2026-02-02T04:00:00"]) {
      taken.push((await runAt(day, "2d+")).name);
      expect(standing()).toEqual(both([...january, ...taken]));
    }
    const third = await runAt("2026-02-03T05:00:00", "2d+");
    expect(standing()).toEqual(both([...january.slice(-3), ...taken.slice(1), third.name]));
  });

  test.each(["5h", "5d", "2w", "2m", "1y", "2d+", "3 14d+"])(
    "policy %p is suspended",
    async (policy) => {
      const names = every(1, 10, "2025-01-31T03:00:00");
      const { standing, runAt } = await habit(names, "2025-01-31T03:00:10");
      const ahead = await runAt("2029-02-01T04:00:00", policy);
      expect(standing()).toEqual(both([...names, ahead.name]));
    },
  );

  test("a number of snapshots does not depend on the clock, and is kept to", async () => {
    const { standing, runAt } = await afterJanuary();
    const ahead = await runAt("2026-02-01T04:00:00", "3");
    expect(standing()).toEqual(both([...january.slice(-2), ahead.name]));
  });

  test("each side by its own policy: a number at the source goes on, days at the destination wait", async () => {
    const { source, snapshots, destination } = await afterJanuary();
    await expectRun(0, ["-N", "3", "-n", "14d+", source, destination], at("2026-02-01T04:00:00"));
    const now = snapshotNames(snapshots).at(-1) as string;
    expect(snapshotNames(snapshots)).toEqual([...january.slice(-2), now]);
    expect(snapshotNames(destination)).toEqual([...january, now]);
  });

  test("--adopt-clock ends it, but for the newest three from before", async () => {
    const { standing, runAt } = await afterJanuary();
    const first = await runAt("2026-02-01T04:00:00", "14d+");
    expect(standing()).toEqual(both([...january, first.name]));
    const second = await runAt("2026-02-01T05:00:00", "14d+", "--adopt-clock");
    expect(standing()).toEqual(both([...january.slice(-3), first.name, second.name]));
  });

  test("a clock without a battery starts in 1970: nothing goes, and nothing is lost when it is right again", async () => {
    const { standing, runAt } = await afterJanuary();
    const first = await runAt("1970-01-01T00:00:05", "7d");
    expect(standing()).toEqual(both([...january, first.name]));
    expectWarned(first);
    const right: string[] = [];
    for (const day of ["01", "02", "03"]) {
      right.push((await runAt(`2025-02-${day}T04:00:00`, "7d")).name);
      for (const side of standing())
        expect(side).toEqual(expect.arrayContaining([...january.slice(-3), ...right]));
    }
    // And the policy is kept to again.
    for (const side of standing()) expect(side).not.toContain(january[0]);
  });

  test.each<[string, string, string[], string, string]>([
    [
      "forward",
      "2025-03-30",
      ["20250329-220000", "20250329-230000", "20250330-000000", "20250330-010000"],
      "2025-03-30T01:00:00",
      "20250330-030000",
    ],
    [
      "back",
      "2025-10-26",
      ["20251025-230000", "20251026-010000", "20251026-020000", "20251026-025900"],
      "2025-10-26T01:10:00",
      "20251026-0210",
    ],
  ])("clocks that go an hour %s (%s) do not leap", async (_, __, names, utc, name) => {
    const { source, snapshots, destination } = pair();
    for (const one of names) snapshotAs(source, one);
    const result = await expectRun(
      0,
      ["--json", "-N", "2h+", "-n", "2h+", source, destination],
      at(utc, { TZ: "Europe/Berlin" }),
    );
    expect(events(result).find(({ event }) => event === "snapshot")?.["name"]).toStartWith(
      name.slice(0, 13),
    );
    expect(result.stderr).not.toMatch(/clock/);
    expect(snapshotNames(snapshots)).not.toContain(names[0] as string);
    expect(snapshotNames(destination)).not.toContain(names[0] as string);
  });

  test("a flight over the date line, 25 hours back by the ticket, is no leap", async () => {
    const { source, snapshots, destination } = pair();
    for (const name of ["20250601-100000", "20250602-100000", "20250610-120000"])
      snapshotAs(source, name);
    const result = await expectRun(
      0,
      ["--json", "-N", "3d+", "-n", "3d+", source, destination],
      at("2025-06-09T22:05:00", { TZ: "Pacific/Niue" }),
    );
    expect(events(result).find(({ event }) => event === "snapshot")?.["name"]).toStartWith(
      "20250609-1105",
    );
    expect(
      snapshotNames(snapshots)
        .sort()
        .map((name) => name.slice(0, 13)),
    ).toEqual(["20250609-1105", "20250610-1200"]);
  });

  test("60 days away after a habit of once a week is no leap", async () => {
    const weekly = every(7, 10, "2025-01-31T03:00:00");
    const { standing, runAt } = await habit(weekly, "2025-01-31T03:00:10");
    const back = await runAt("2025-04-01T04:00:00", "14d+");
    expect(back.stderr).not.toMatch(/clock/);
    for (const side of standing()) expect(side).not.toContain(weekly[0]);
  });

  test("60 days away after a habit of once a day could be one: everything waits for three days", async () => {
    const { standing, runAt } = await afterJanuary();
    const back = await runAt("2025-04-01T04:00:00", "14d+");
    expect(standing()).toEqual(both([...january, back.name]));
    expectWarned(back);
    const second = await runAt("2025-04-02T04:00:00", "14d+");
    expect(standing()).toEqual(both([...january, back.name, second.name]));
    const third = await runAt("2025-04-03T04:00:00", "14d+");
    expect(standing()).toEqual(both([...january.slice(-3), back.name, second.name, third.name]));
  });

  test("one lone snapshot: the first is never a leap, and a second one a year later takes nothing from it", async () => {
    const { source, snapshots, destination } = pair();
    const first = await expectRun(
      0,
      ["--json", "-N", "14d+", "-n", "14d+", source, destination],
      at("2025-01-31T03:00:00"),
    );
    expect([first.stderr, warnings(first)]).toEqual([expect.not.stringMatching(/clock/), []]);
    const names = snapshotNames(snapshots);
    await expectRun(
      0,
      ["--json", "-N", "14d+", "-n", "14d+", source, destination],
      at("2026-01-31T03:00:00"),
    );
    const later = expect.stringContaining("20260131-0300");
    for (const folder of [snapshots, destination])
      expect(snapshotNames(folder)).toEqual([...names, later]);
  });

  test("a copy of backups keeps to it as well, and --adopt-clock ends it there", async () => {
    const names = [...every(1, 20, "2025-01-31T03:00:00"), "20260201-030000"];
    const { source, destination } = pair();
    for (const name of names) snapshotAs(source, name);
    await expectRun(0, ["-S", source, destination], at("2026-02-01T03:00:10"));
    const other = join(filesystem().path, "other");
    await expectRun(0, ["copy", destination, other], at("2026-02-01T04:00:00"));
    expectWarned(
      await expectRun(
        0,
        ["copy", "--json", "-n", "14d+", destination, other],
        at("2026-02-01T04:00:00"),
      ),
    );
    expect(snapshotNames(other)).toEqual(names);
    await expectRun(
      0,
      ["copy", "-n", "14d+", "--adopt-clock", destination, other],
      at("2026-02-01T04:00:00"),
    );
    expect(snapshotNames(other)).toEqual(names.slice(-4));
  });

  describe("prune goes by when backups arrived, and by its own clock", () => {
    /** A `btrfs`, and a `stat`, for which each backup arrived at the time of its name. */
    function arrivalByName() {
      const tools = temporaryDirectory();
      const real = sh("command -v btrfs");
      writeFileSync(
        join(tools, "btrfs"),
        `#!/bin/bash
        if [ "$1 $2" = "subvolume show" ]; then
          name=\${!#}
          name=\${name##*/}
          time="\${name:0:4}-\${name:4:2}-\${name:6:2} \${name:9:2}:\${name:11:2}:\${name:13:2} +0000"
          ${real} "$@" | sed "s/\\(Creation time:[[:space:]]*\\).*/\\1$time/"
          exit "\${PIPESTATUS[0]}"
        fi
        if [ "$1 $2" = "subvolume list" ] && [[ " $* " = *" -s "* ]]; then
          ${real} "$@" | sed -E "s/otime \\S+ \\S+ (.*)(....)(..)(..)-(..)(..)(..)$/otime \\2-\\3-\\4 \\5:\\6:\\7 \\1\\2\\3\\4-\\5\\6\\7/"
          exit "\${PIPESTATUS[0]}"
        fi
        exec ${real} "$@"
        `.replace(/^ {8}/gm, ""),
        { mode: 0o755 },
      );
      writeFileSync(
        join(tools, "stat"),
        `#!/bin/bash
        [ "$2" = "%W %n" ] || exec ${sh("command -v stat")} "$@"
        shift 3
        for path; do
          name=\${path##*/}
          echo "$(TZ=UTC0 date -d "\${name:0:4}-\${name:4:2}-\${name:6:2} \${name:9:2}:\${name:11:2}:\${name:13:2} +0000" +%s) $path"
        done
        `.replace(/^ {8}/gm, ""),
        { mode: 0o755 },
      );
      return pathWith(tools);
    }
    const names = [...january, "20260201-030000"];
    const now = "2026-02-01T04:00:00";

    test("a backup that arrives a year after all others pushes none of them out", async () => {
      const { source, destination } = pair();
      for (const name of names) snapshotAs(source, name);
      await expectRun(0, ["-S", source, destination]);
      const options = at(now, arrivalByName());
      const pruned = await expectRun(0, ["prune", "--json", "-n", "14d+", destination], options);
      expect(snapshotNames(destination)).toEqual(names);
      expectWarned(pruned);
      await expectRun(0, ["prune", "-n", "14d+", "--adopt-clock", destination], options);
      expect(snapshotNames(destination)).toEqual(names.slice(-4));
      await expectRun(0, ["prune", "-n", "2", destination], options);
      expect(snapshotNames(destination)).toEqual(names.slice(-2));
    });

    test("nor does a stream", async () => {
      const { source } = pair();
      const folder = temporaryDirectory();
      for (const name of names) snapshotAs(source, name);
      await expectRun(0, ["-S", "--full-every", "1", source, `raw://${folder}`]);
      for (const name of readdirSync(folder).filter((one) => /^\d{8}-/.test(one)))
        sh(
          `touch -d "$2" "$1"`,
          join(folder, name),
          `${name.slice(0, 8)} ${name.slice(9, 11)}:${name.slice(11, 13)}Z`,
        );
      const standing = () =>
        readdirSync(folder)
          .filter((one) => one.endsWith(".btrfs"))
          .map((one) => one.slice(0, 15))
          .sort();
      const pruned = await expectRun(
        0,
        ["prune", "--json", "-n", "14d+", `raw://${folder}`],
        at(now),
      );
      expect(standing()).toEqual(names);
      expectWarned(pruned);
      await expectRun(0, ["prune", "-n", "14d+", "--adopt-clock", `raw://${folder}`], at(now));
      expect(standing()).toEqual(names.slice(-4));
    });

    test("a habit without a leap is pruned as ever", async () => {
      const { source, destination } = pair();
      for (const name of january) snapshotAs(source, name);
      await expectRun(0, ["-S", source, destination]);
      const pruned = await expectRun(
        0,
        ["prune", "-n", "14d+", destination],
        at("2025-01-31T04:00:00", arrivalByName()),
      );
      expect(pruned.stderr).not.toMatch(/clock/);
      expect(snapshotNames(destination)).toEqual(january.slice(-15));
    });
  });
});

describe("what could not be sent is kept", () => {
  type Made = Pick<ReturnType<typeof pair>, "source" | "snapshots" | "destination">;

  /** Runs again and again, with something new each time; the snapshots' names. */
  async function runs(
    times: number,
    status: number,
    source: string,
    args: readonly string[],
    options?: Parameters<typeof run>[1],
  ) {
    const names: string[] = [];
    let last: Result | null = null;
    for (let i = 0; i < times; i++) {
      await nextSecond();
      writeFileSync(join(source, "state"), String(Math.random()));
      last = await expectRun(status, ["--json", ...args], options);
      names.push(events(last).find(({ event }) => event === "snapshot")?.["name"]);
    }
    return { names, last: last as Result };
  }

  /** A first backup, to a disk that is then unmounted. */
  async function away() {
    const { source, snapshots, destination, a, b } = pair();
    await expectRun(0, [source, destination]);
    const [pin = ""] = snapshotNames(snapshots);
    unmount(b);
    return { source, snapshots, destination, a, b, pin };
  }

  /** One line says how many are kept, for whom, since when, and what can be done. */
  function expectTold(stderr: string, id: string): void {
    const lines = stderr.split("\n").filter((line) => line.includes("--drop-unsent"));
    expect(lines).toEqual([expect.stringContaining(id)]);
    const text = (lines[0] ?? "").replaceAll(id, "");
    expect(text).toMatch(/\d+ snapshots?/);
    expect(text).toMatch(/since/);
    expect(text).toMatch(/--optional|unpin/);
  }

  /** All of them arrive in the next run, each as a difference, and then the source's policy is kept to. */
  async function expectAllArrive(
    made: Made,
    pin: string,
    names: readonly string[],
    policy: number,
    id = made.destination,
    more: string[] = [],
  ) {
    const { source, snapshots, destination } = made;
    await nextSecond();
    const back = await expectRun(0, ["--json", "-N", String(policy), source, id, ...more]);
    const now = events(back).find(({ event }) => event === "snapshot")?.["name"] as string;
    const all = [pin, ...names, now];
    const sent = transfers(back).filter((transfer) => transfer["destination"] === id);
    expect(sent.map(({ name, parent }) => [name, parent])).toEqual(
      all.slice(1).map((name, i) => [name, all[i]]),
    );
    expect(snapshotNames(destination)).toEqual(all);
    expect(snapshotNames(snapshots)).toEqual(all.slice(-policy));
    expectSound(destination, snapshots);
  }

  test("six runs while the disk is unmounted, -N 2: all six are kept, told of, and arrive as soon as it is back", async () => {
    const { pin, ...made } = await away();
    const { names, last } = await runs(6, 1, made.source, [
      "-N",
      "2",
      made.source,
      made.destination,
    ]);
    expect(snapshotNames(made.snapshots)).toEqual([pin, ...names]);
    expectTold(last.stderr, made.destination);
    mountImage(made.b);
    await expectAllArrive(made, pin, names, 2);
  });

  test("so they are when a server refuses, and a destination that is well is served and pruned meanwhile", async () => {
    const { options, url } = await sshServer();
    const { source, snapshots, destination } = pair();
    const other = join(filesystem().path, "other");
    await expectRun(0, [...options, source, url(destination), other]);
    const [pin = ""] = snapshotNames(snapshots);
    const tools = temporaryDirectory();
    const script =
      "#!/bin/sh\necho 'ssh: connect to host 127.0.0.1: Connection refused' >&2\nexit 255\n";
    writeFileSync(join(tools, "ssh"), script, { mode: 0o755 });
    const args = ["-N", "1", ...options, source, url(destination), "--for", other, "-n", "2"];
    const { names, last } = await runs(3, 1, source, args, { env: pathWith(tools) });
    expect(snapshotNames(snapshots)).toEqual([pin, ...names]);
    expect(snapshotNames(other)).toEqual(names.slice(-2));
    expectTold(last.stderr, url(destination));
    await expectAllArrive({ source, snapshots, destination }, pin, names, 1, url(destination), [
      ...options,
      other,
    ]);
  });

  test("and when a transfer fails", async () => {
    const { source, snapshots, destination } = pair();
    await expectRun(0, [source, destination]);
    const [pin = ""] = snapshotNames(snapshots);
    const tools = temporaryDirectory();
    const real = sh("command -v btrfs");
    const script = `#!/bin/sh\ncase "$*" in *receive*) echo "ERROR: no luck" >&2; exit 1;; esac\nexec ${real} "$@"\n`;
    writeFileSync(join(tools, "btrfs"), script, { mode: 0o755 });
    const { names, last } = await runs(3, 1, source, ["-N", "1", source, destination], {
      env: pathWith(tools),
    });
    expect(last.stderr).toContain("no luck");
    expect(snapshotNames(snapshots)).toEqual([pin, ...names]);
    expectTold(last.stderr, destination);
    await expectAllArrive({ source, snapshots, destination }, pin, names, 1);
  });

  test("the old name of what is now the default is still taken", async () => {
    const { source, snapshots, destination, pin } = await away();
    const { names } = await runs(3, 1, source, ["-N", "1", "--keep-unsent", source, destination]);
    expect(snapshotNames(snapshots)).toEqual([pin, ...names]);
  });

  test("with --drop-unsent, -N is kept to: only what the next transfer builds on stays beside it", async () => {
    const { source, snapshots, destination, pin, b } = await away();
    const { names } = await runs(6, 1, source, ["-N", "2", "--drop-unsent", source, destination]);
    expect(snapshotNames(snapshots)).toEqual([pin, ...names.slice(-2)]);
    mountImage(b);
    await expectAllArrive({ source, snapshots, destination }, pin, names.slice(-2), 2);
  });

  test("for an --optional destination only what the next transfer builds on stays", async () => {
    const { source, snapshots, destination, pin } = await away();
    const { names, last } = await runs(6, 0, source, [
      "-N",
      "2",
      "--optional",
      destination,
      source,
    ]);
    expect(snapshotNames(snapshots)).toEqual([pin, ...names.slice(-2)]);
    expect(last.stderr).not.toContain("--drop-unsent");
  });

  test("of several, each by its own word: what one that must be there lacks is kept, whatever an optional one lacks", async () => {
    const { source, snapshots, destination, b } = pair();
    const optional = filesystem();
    const usb = join(optional.path, "usb");
    await expectRun(0, [source, destination, "--optional", usb]);
    const [pin = ""] = snapshotNames(snapshots);
    unmount(optional);
    const { names } = await runs(3, 0, source, ["-N", "1", source, destination, "--optional", usb]);
    expect(snapshotNames(snapshots)).toEqual([pin, ...names.slice(-1)]);
    unmount(b);
    const { names: more, last } = await runs(3, 1, source, [
      "-N",
      "1",
      source,
      destination,
      "--optional",
      usb,
    ]);
    expect(snapshotNames(snapshots)).toEqual([pin, ...names.slice(-1), ...more]);
    expectTold(last.stderr, destination);
    for (const one of [b, optional]) mountImage(one);
  });

  test.each([1, 3])(
    "no more is kept than the destination's own policy would still want: -n %i",
    async (wanted) => {
      const { source, snapshots, destination, pin, b } = await away();
      const policy = ["-N", "1", "-n", String(wanted)];
      const { names } = await runs(5, 1, source, [...policy, source, destination]);
      expect(snapshotNames(snapshots)).toEqual([pin, ...names.slice(-wanted)]);
      mountImage(b);
      await nextSecond();
      const back = await expectRun(0, ["--json", ...policy, source, destination]);
      for (const { parent } of transfers(back)) expect(parent).not.toBeNull();
      expect(snapshotNames(destination).length).toBe(wanted);
      expectSound(destination, snapshots);
    },
  );

  test("when less than 5 % of the source's filesystem is free, the oldest of them go, never what the next transfer builds on", async () => {
    const small = filesystem({ size: "300M", mkfs: ["--mixed"] });
    const source = subvolume(join(small.path, "home"));
    const snapshots = join(source, "snapshot");
    const b = filesystem();
    const destination = join(b.path, "backup");
    writeFileSync(join(source, "small"), "x");
    await expectRun(0, [source, destination]);
    const [pin = ""] = snapshotNames(snapshots);
    unmount(b);
    const names: string[] = [];
    for (let i = 0; i < 5; i++) {
      sh(`head -c 8M /dev/urandom >"$1/large"`, source);
      names.push(...(await runs(1, 1, source, ["-N", "1", source, destination])).names);
    }
    expect(snapshotNames(snapshots)).toEqual([pin, ...names]);
    const free = () =>
      sh(
        `sync -f "$1"; df --output=avail,size "$1" | awk 'NR == 2 { printf "%d", 100 * $1 / $2 }'`,
        small.path,
      );
    for (let i = 0; Number(free()) >= 3; i++)
      sh(`fallocate -l 2M "$1/ballast-$2"`, small.path, String(i));
    const {
      names: [newest = ""],
      last,
    } = await runs(1, 1, source, ["-N", "1", source, destination]);
    const left = snapshotNames(snapshots);
    expect(left[0]).toBe(pin);
    expect(left.at(-1)).toBe(newest);
    expect(left).not.toContain(names[0] as string);
    // The oldest first: what is left are the last ones.
    expect([...names, newest].slice(1 - left.length)).toEqual(left.slice(1));
    expect(last.stderr).toMatch(/5 ?%|free|space/);
    expect(
      events(last).filter(
        ({ event, message }) => event === "warning" && /5 ?%|free|space/.test(message),
      ).length,
    ).toBeGreaterThan(0);
    mountImage(b);
    await nextSecond();
    const back = await expectRun(0, ["--json", source, destination]);
    for (const { parent } of transfers(back)) expect(parent).not.toBeNull();
    expectSound(destination, snapshots);
  });
});

describe("an automounted destination works at the first touch", () => {
  /** A disk that automount mounts when something below its folder is touched; `expire`: unmounted, as after a time without use. */
  async function automounted() {
    const disk = filesystem();
    unmount(disk);
    const directory = temporaryDirectory();
    const folder = join(directory, "auto");
    mkdirSync(folder);
    writeFileSync(join(directory, "master"), `${folder} ${directory}/map\n`);
    writeFileSync(join(directory, "map"), `disk -fstype=btrfs,loop,noatime :${disk.image}\n`);
    // In a session of its own: what is in automount's process group mounts nothing by touching it.
    const words = [
      "-f",
      "-t",
      "600",
      "--pid-file",
      join(directory, "pid"),
      join(directory, "master"),
    ];
    const automount = spawn("/usr/sbin/automount", words, { detached: true, stdio: "ignore" });
    const gone = new Promise((done) => automount.on("close", done));
    const mounts = () => readFileSync("/proc/self/mountinfo", "utf8").split("\n");
    const mounted = (path: string, type: string) =>
      mounts().some((line) => line.includes(` ${path} `) && line.includes(` - ${type} `));
    const known = () => existsSync(`/sys/fs/btrfs/${disk.uuid}`);
    const at = join(folder, "disk");
    const expire = async () => {
      const free = () =>
        !mounted(at, "btrfs") || sh(`umount "$1" 2>/dev/null && echo free || :`, at) === "free";
      await waitFor("the disk to be free", free);
      await waitFor("the filesystem to be gone", () => !known());
    };
    const end = async () => {
      automount.kill("SIGTERM");
      await Promise.race([gone, Bun.sleep(10_000)]);
      automount.kill("SIGKILL");
      sh(`umount -l "$1" "$2" 2>/dev/null || :`, at, folder);
    };
    try {
      await waitFor("automount", () => mounted(folder, "autofs"), 20);
    } catch (error) {
      await end();
      throw error;
    }
    return { place: join(at, "backup"), touched: () => mounted(at, "btrfs"), known, expire, end };
  }

  test("of run, list, verify, prune, restore and copy, each after the disk was away", async () => {
    const { source, snapshots, destination, a, b } = pair();
    const { place, touched, known, expire, end } = await automounted();
    try {
      const touch = async (...args: string[]) => {
        await expire();
        expect([touched(), known()]).toEqual([false, false]);
        await nextSecond();
        const result = await expectRun(0, args);
        expect([args, touched()]).toEqual([args, true]);
        return result;
      };
      await touch(source, place);
      expect(snapshotNames(place)).toEqual(snapshotNames(snapshots));
      writeFileSync(join(source, "state"), "second");
      expect(transfers(await touch("--json", source, place))).toMatchObject([
        { parent: snapshotNames(snapshots)[0] },
      ]);
      expectSound(place, snapshots);
      expect((await touch("list", place)).stdout).toMatch(/whole(.|\n)*whole/);
      expect((await touch("list", source)).stdout).toMatch(/whole, pin/);
      await touch("verify", place, source);
      await touch("verify", source, place);
      await touch("versions", join(source, "state"), place);
      await touch("restore", place, join(a.path, "again"));
      expect(contentsDigest(join(a.path, "again"))).toBe(contentsDigest(source));
      await touch("copy", place, destination);
      expectSound(destination, snapshots);
      await touch("copy", destination, `${place}-too`);
      expectSound(`${place}-too`, snapshots);
      await touch("prune", "-n", "1", place);
      expect(snapshotNames(place)).toEqual(snapshotNames(snapshots).slice(-1));
      await touch(source, place, join(b.path, "other"));
      await touch("-S", source, `raw://${place}-raw`);
      await touch("verify", `raw://${place}-raw`);
    } finally {
      await end();
    }
  }, 120_000);
});
