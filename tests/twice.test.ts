// What was sent once is not sent again: what came belated keeps its place, and what retention removed does not come back.

import { describe, expect, test } from "bun:test";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSound,
  filesystem,
  pair,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolumes,
  temporaryDirectory,
  transfers,
  treeDigest,
  waitFor,
  logged,
} from "./support/rig.ts";
import { seeded, soak } from "./support/random.ts";
import { day } from "./support/names.ts";

const listed = async (place: string) => {
  const [{ snapshots }] = events(await expectRun(0, ["list", "--json", place])).filter(
    ({ event }) => event === "list",
  ) as [any];
  return (snapshots.map(({ name }: { name: string }) => name) as string[]).reverse(); // the newest is first there
};
/** A source of some MB with snapshots of so many days, each with a little that is new. */
function days(count: number) {
  const { source, snapshots, destination, a, b } = pair();
  sh(`head -c 8M /dev/urandom >"$1/large"`, source);
  for (let n = 1; n <= count; n++) {
    writeFileSync(join(source, "day"), `${n}`);
    snapshotAs(source, day(n));
  }
  return { source, snapshots, destination, a, b };
}
const range = (from: number, to: number) =>
  Array.from({ length: to - from + 1 }, (_, i) => day(from + i));

describe("an earlier snapshot that comes after a later one", () => {
  test.each(["folder", "ssh", "raw"])(
    "where -n was loosened (%s), and the places keep the order of the days",
    async (kind) => {
      const { source, snapshots, destination, a } = days(8);
      const { options, url } = await sshServer();
      const place =
        kind === "folder"
          ? destination
          : kind === "ssh"
            ? url(destination)
            : `raw://${destination}`;
      const args = [...(kind === "ssh" ? options : []), "--json", "-S", source, place];
      await expectRun(0, ["-n", "2", ...args]);
      const more = transfers(await expectRun(0, ["-n", "6", ...args]));
      expect(more.map(({ name, parent }) => [name, parent])).toEqual([
        [day(3), day(7)],
        [day(4), day(3)],
        [day(5), day(4)],
        [day(6), day(5)],
      ]);
      expect(await listed(kind === "raw" ? place : destination)).toEqual(range(3, 8));
      if (kind !== "raw") expectSound(destination, snapshots);
      // By the same order, the newest is what is given back, and the oldest goes.
      await expectRun(0, ["restore", kind === "raw" ? place : destination, join(a.path, "again")]);
      expect(contentsDigest(join(a.path, "again"))).toBe(contentsDigest(source));
      await expectRun(0, [
        "restore",
        "--snapshot",
        day(4),
        kind === "raw" ? place : destination,
        join(a.path, "fourth"),
      ]);
      expect(sh(`cat "$1/day"`, join(a.path, "fourth"))).toBe("4");
      writeFileSync(join(source, "day"), "9");
      snapshotAs(source, day(9));
      const last = transfers(await expectRun(0, ["-n", "3", ...args]));
      expect(last.map(({ name, parent }) => [name, parent])).toEqual([[day(9), day(8)]]);
      // Of streams, what others build on stays as well.
      if (kind !== "raw") expect(snapshotNames(destination)).toEqual(range(7, 9));
      // Without the source's help, too.
      sh(`btrfs -q subvolume delete "$1"/2* >/dev/null`, snapshots);
      expect((await listed(kind === "raw" ? place : destination)).at(-1)).toBe(day(9));
    },
  );

  test("after one --newest-only as well, with --backfill; without, what is older is left out, which one line says", async () => {
    const { source, snapshots, destination } = days(5);
    await expectRun(0, ["-S", "--newest-only", source, destination]);
    const nothing = await expectRun(0, ["--json", "-S", source, destination]);
    expect(transfers(nothing)).toEqual([]);
    expect(
      logged(nothing.stderr).match(
        /4 snapshots older than the newest one there are not sent; --backfill sends them/g,
      )?.length,
    ).toBe(1);
    const all = transfers(await expectRun(0, ["--json", "-S", "--backfill", source, destination]));
    expect(all.map(({ name, parent }) => [name, parent])).toEqual([
      [day(1), day(5)],
      [day(2), day(1)],
      [day(3), day(2)],
      [day(4), day(3)],
    ]);
    expectSound(destination, snapshots);
    expect(await listed(destination)).toEqual(range(1, 5));
    // A copy knows the order, too.
    const copied = join(filesystem().path, "copied");
    await expectRun(0, ["copy", destination, copied]);
    expect(await listed(copied)).toEqual(range(1, 5));
    // And a prune, which goes by when they arrived, keeps the newest all the same, also when the first that came belated is gone.
    await expectRun(0, ["prune", "-n", "3", destination]);
    expect(snapshotNames(destination)).toEqual([day(2), day(3), day(4), day(5)]);
    await expectRun(0, ["prune", "-n", "1", destination]);
    expect(snapshotNames(destination)).toEqual([day(4), day(5)]);
    expect(
      (await expectRun(2, ["-S", "--backfill", "--newest-only", source, destination])).stderr,
    ).toContain("contradict each other");
  });

  test("and streams, of which prune keeps the newest all the same", async () => {
    const { source, destination } = days(5);
    const stored = `raw://${destination}`;
    await expectRun(0, ["-S", "-n", "2", source, stored]);
    await expectRun(0, ["-S", "-n", "5", source, stored]);
    await expectRun(0, ["prune", "-n", "1", stored]);
    expect(await listed(stored)).toContain(day(5));
    await expectRun(0, ["verify", stored]);
  });

  /** A source with three snapshots, in the second of which a file is cut off within its only block, and moved. */
  function cutOff(name = "odd \\303 \u00e4 name") {
    const { source, snapshots, destination, a, b } = pair();
    const file = join(source, name);
    sh(`head -c 3000 /dev/urandom >"$1"`, file);
    snapshotAs(source, day(1));
    sh(`mkdir "$1/moved"; truncate -s 100 "$2"; mv "$2" "$1/moved/file"`, source, file);
    snapshotAs(source, day(2));
    writeFileSync(join(source, "day"), "3");
    snapshotAs(source, day(3));
    return { source, snapshots, destination, a, b };
  }
  const LOSS =
    /in full: (\d{8}-000000) is not known to be an earlier state of (\d{8}-000000), and btrfs send would lose the end of .*/;

  test("is sent in full where btrfs send would lose something: what was cut off later", async () => {
    const { source, snapshots, destination, a, b } = cutOff("odd \\303\n\u00e4 name");
    const stored = `raw://${join(b.path, "stored")}`;
    const { options, url } = await sshServer();
    for (const place of [destination, stored]) {
      await expectRun(0, ["-S", "--newest-only", source, place]);
      const { stderr } = await expectRun(0, ["-S", "--backfill", source, place]);
      expect(LOSS.exec(stderr)?.slice(1)).toEqual([day(3), day(1)]);
    }
    expectSound(destination, snapshots);
    await expectRun(0, ["restore", "--snapshot", day(1), stored, join(a.path, "from-stream")]);
    expect(treeDigest(join(a.path, "from-stream", "snapshot", day(1)))).toBe(
      treeDigest(join(snapshots, day(1))),
    );
    // The same between two destinations, by ssh, and on the way back.
    const copied = join(filesystem().path, "copied");
    await expectRun(0, ["copy", "--newest-only", ...options, url(destination), copied]);
    // The first was received in full there: none of the others was made from it.
    expect(
      (await expectRun(0, ["copy", "--backfill", ...options, url(destination), copied])).stderr,
    ).toMatch(/in full: .* was not made from it/);
    expectSound(copied, snapshots);
  });

  test("also where another file has the path that it had", async () => {
    const { source, snapshots, destination } = pair();
    sh(
      `cd "$1"; head -c 8000 /dev/urandom >f1; head -c 8000 /dev/urandom >f2; mkdir new old; mv f1 new/f; mv f2 old/f`,
      source,
    );
    snapshotAs(source, day(1));
    sh(`cd "$1"; mv old x; mv new old; mv x new; truncate -s 5000 old/f`, source);
    snapshotAs(source, day(2));
    await expectRun(0, ["-S", "--newest-only", source, destination]);
    expect((await expectRun(0, ["-S", "--backfill", source, destination])).stderr).toMatch(LOSS);
    expectSound(destination, snapshots);
  });

  test.each<[string, string, string]>([
    [
      "somebody's attribute looks like a command",
      `touch g; setfattr -n user.q -v "$(printf 'x\\nwrite           ./${day(1)}/f offset=0 len=99999\\n.')" g`,
      "setfattr -x user.q g",
    ],
    [
      "a link leads from the parent to the snapshot",
      "mkdir dir; mv f dir/f",
      `mv dir dir2; ln -s "$1/snapshot/${day(1)}/dir" dir; mv dir2/f f`,
    ],
    [
      "a file with another name than UTF-8 has changed as well",
      "echo x >\"$(printf 'caf\\351')\"",
      "echo y >>\"$(printf 'caf\\351')\"",
    ],
  ])("and where %s", async (_, first, second) => {
    for (const how of [[], ["--sudo"]]) {
      const { source, snapshots, destination } = pair();
      sh(`cd "$1"; head -c 20000 /dev/urandom >f; sync; ${first}`, source);
      snapshotAs(source, day(1));
      sh(`cd "$1"; truncate -s 18000 $([ -f f ] && echo f || echo dir/f); ${second}`, source);
      snapshotAs(source, day(2));
      await expectRun(0, [...how, "-S", "--newest-only", source, destination]);
      expect(
        (await expectRun(0, [...how, "-S", "--backfill", source, destination])).stderr,
      ).toContain(`in full: ${day(2)} is not known to be an earlier state of ${day(1)}`);
      expectSound(destination, snapshots);
    }
  });

  test("so is a difference to a snapshot that was edited before it was sent", async () => {
    const { source, snapshots, destination } = pair();
    sh(`head -c 8000 /dev/urandom >"$1/f"`, source);
    snapshotAs(source, day(1));
    sh(
      `btrfs property set -ts "$1" ro false; truncate -s 5000 "$1/f"; btrfs property set -ts "$1" ro true`,
      join(snapshots, day(1)),
    );
    snapshotAs(source, day(2));
    expect((await expectRun(0, ["-S", source, destination])).stderr).toMatch(LOSS);
    expectSound(destination, snapshots);
  });

  test("an ordinary run looks through nothing, whatever files are called", async () => {
    const { source, snapshots, destination } = pair();
    await expectRun(0, [source, destination]);
    sh(`cd "$1"; echo x >"$(printf 'caf\\351')"`, source);
    const tools = temporaryDirectory();
    const calls = join(tools, "calls");
    writeFileSync(
      join(tools, "btrfs"),
      `#!/bin/sh\nPATH=\${PATH#*:}\necho "$*" >>${calls}\nexec btrfs "$@"\n`,
      { mode: 0o755 },
    );
    const result = await expectRun(0, ["--json", "--wait", "60", source, destination], {
      env: { PATH: `${tools}:${process.env["PATH"]}` },
    });
    expect([transfers(result).length, transfers(result)[0]?.["parent"] !== null]).toEqual([
      1,
      true,
    ]);
    expect(sh(`cat "$1"`, calls)).not.toContain("--dump");
    expect((await expectRun(0, ["--dry-run", source, destination])).stderr).toContain(
      "difference to",
    );
    expectSound(destination, snapshots);
  });

  test("so is one that is restored where only a later one is", async () => {
    const { source, snapshots, destination, a } = cutOff();
    await expectRun(0, ["-S", source, destination]);
    const original = treeDigest(join(snapshots, day(1)));
    sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(snapshots, day(1)));
    expect(
      (
        await expectRun(0, [
          "restore",
          "--parent-from",
          snapshots,
          "--snapshot",
          day(1),
          destination,
          join(a.path, "back"),
        ])
      ).stderr,
    ).toMatch(LOSS);
    expect(treeDigest(join(destination, day(1)))).toBe(original);
    expect(contentsDigest(join(a.path, "back"))).toBe(contentsDigest(join(destination, day(1))));
  });

  test("is a difference after the way led back: to what the source was made of, else only if nothing is lost", async () => {
    for (const isGone of [false, true]) {
      const { source, snapshots, destination } = cutOff();
      await expectRun(0, ["-S", source, destination]);
      await expectRun(0, ["restore", "--replace", "--snapshot", day(1), snapshots, source]);
      if (isGone)
        sh(
          `btrfs -q subvolume delete "$1/${day(1)}" "$2/${day(1)}" >/dev/null`,
          snapshots,
          destination,
        );
      writeFileSync(join(source, "day"), "4");
      snapshotAs(source, day(4));
      const result = await expectRun(0, ["--json", "-S", source, destination]);
      expect(transfers(result).map(({ name, parent }) => [name, parent])).toEqual([
        [day(4), isGone ? null : day(1)],
      ]);
      expect(LOSS.test(result.stderr)).toBe(isGone);
      expectSound(destination, snapshots);
    }
  });

  test.each([true, false])("is told by btrfs over ssh, and by a guard (%s)", async (isGuarded) => {
    const { source, snapshots, destination } = cutOff();
    const { guarded, options, url } = await sshServer();
    const key = isGuarded ? guarded("--path", source, "--source") : options;
    await expectRun(0, ["-S", "--newest-only", ...key, url(source), destination]);
    const result = await expectRun(0, [
      "--json",
      "-S",
      "--backfill",
      ...key,
      url(source),
      destination,
    ]);
    expect(transfers(result).map(({ name, parent }) => [name, parent])).toEqual([
      [day(1), null],
      [day(2), day(1)],
    ]);
    expect(LOSS.exec(result.stderr)?.slice(1) ?? result.stderr).toEqual([day(3), day(1)]);
    expectSound(destination, snapshots);
  });

  /** Cuts off a file somewhere, and lets directories change their names, or their places. */
  function move(source: string, random: () => number) {
    const all = sh(`cd "$1"; find plain -type f; echo; find plain -mindepth 1 -type d`, source)
      .split("\n\n")
      .map((some) => some.split("\n"));
    const pick = (some: readonly string[] = []) => some[Math.floor(random() * some.length)] ?? "";
    sh(
      `cd "$1"; [ ! -f "$2" ] || truncate -s "$3" "$2"`,
      source,
      pick(all[0]),
      String(Math.floor(random() * 9000)),
    );
    const [one, other] = [pick(all[1]), pick(all[1])];
    sh(
      `cd "$1"; [ ! -d "$2" ] || [ ! -d "$3" ] || case "$2/" in "$3"/*) ;; *) case "$3/" in "$2"/*) ;; *) mv -T "$2" plain/away; mv -T "$3" "$2"; mv -T plain/away "$3";; esac;; esac`,
      source,
      one,
      other,
    );
  }

  test("random trees, changed in any way: what arrives is what was there", async () => {
    const random = seeded();
    const { source, snapshots, destination } = pair();
    for (let round = 1; round <= soak(6); round++) {
      for (let i = 0; i < 4; i++) {
        change(source, random);
        move(source, random);
        snapshotAs(
          source,
          `2026${String(1 + (round % 12)).padStart(2, "0")}${String(10 + Math.floor(round / 12)).padStart(2, "0")}-00000${i}`,
        );
      }
      await expectRun(0, ["-S", "--newest-only", source, destination]);
      await expectRun(0, ["-S", "--backfill", source, destination]);
    }
    expectSound(destination, snapshots);
    for (const name of snapshotNames(snapshots))
      expect([name, treeDigest(join(destination, name))]).toEqual([
        name,
        treeDigest(join(snapshots, name)),
      ]);
  });

  test("--no-full fails where nothing is shared, and sends nothing", async () => {
    const { source, snapshots, destination } = days(2);
    const stored = `raw://${temporaryDirectory()}`;
    for (const place of [destination, stored]) {
      const result = await expectRun(1, ["--json", "-S", "--no-full", source, place]);
      expect([
        transfers(result),
        result.stderr.includes(
          "would be sent in full: nothing of it is there; --no-full forbids it",
        ),
      ]).toEqual([[], true]);
      // It is told once, as nothing that is sent; and nobody is told to delete a snapshot for it.
      expect(events(result).filter(({ event }) => event === "error").length).toBe(1);
      expect(result.stderr).not.toMatch(/Sending|subvolume delete/);
    }
    expect(existsSync(destination) ? subvolumes(destination).size : 0).toBe(0);
    await expectRun(0, ["-S", source, destination, stored]);
    snapshotAs(source, day(3));
    await expectRun(0, [
      "-S",
      "--no-full",
      source,
      destination,
      "--for",
      stored,
      "--full-every",
      "2",
    ]); // a new chain is full
    expectSound(destination, snapshots);
    expect(
      (await expectRun(2, ["-S", "--no-full", "--no-incremental", source, destination])).stderr,
    ).toContain("contradict each other");
  });
});

describe("what retention removed does not come back", () => {
  test("to a server that prunes by itself: in 40 days no snapshot is sent twice", async () => {
    const { source, destination } = pair();
    const { guarded, url } = await sshServer();
    const key = guarded("--path", destination);
    const sent: string[] = [];
    for (let n = 1; n <= 40; n++) {
      writeFileSync(join(source, "day"), `${n}`);
      snapshotAs(
        source,
        `2026${n <= 31 ? "01" : "02"}${String(n <= 31 ? n : n - 31).padStart(2, "0")}-000000`,
      );
      sent.push(
        ...transfers(await expectRun(0, ["--json", "-S", ...key, source, url(destination)])).map(
          ({ name }) => name,
        ),
      );
      await expectRun(0, ["prune", "-n", "3", destination]);
    }
    expect(sent.length).toBe(40);
    expect(new Set(sent).size).toBe(40);
    expect(snapshotNames(destination)).toEqual([
      "20260207-000000",
      "20260208-000000",
      "20260209-000000",
    ]);
  });

  /** A PATH on which the sending of one snapshot fails, and that of another lasts until it is ended. */
  function failing(one: string, endless = "none") {
    const tools = temporaryDirectory();
    writeFileSync(
      join(tools, "btrfs"),
      `#!/bin/sh\nPATH=\${PATH#*:}\ncase "$*" in "send "*--no-data*) ;; "send "*${one}) echo "ERROR: failed to read" >&2; exit 1;; "send "*${endless}) touch ${tools}/begun; exec sleep 1000;; esac\nexec btrfs "$@"\n`,
      { mode: 0o755 },
    );
    return {
      env: { PATH: `${tools}:${process.env["PATH"]}` },
      begun: () => existsSync(join(tools, "begun")),
    };
  }

  test("nor is what failed forgotten when the run ends before its time", async () => {
    const { source, snapshots, destination } = days(4);
    const { env, begun } = failing(day(2), day(4));
    const running = start(["-S", source, destination], { env });
    await waitFor("the last one", begun);
    running.child.kill("SIGTERM");
    expect((await running.finished).status).toBe(143);
    expect(snapshotNames(destination)).toEqual([day(1), day(3)]);
    const sent = transfers(await expectRun(0, ["--json", "-S", "-N", "1", source, destination]));
    expect(sent.map(({ name }) => name).sort()).toEqual([day(2), day(4)]);
    expect(await listed(destination)).toEqual(range(1, 4));
    expect(snapshotNames(snapshots)).toEqual([day(4)]);
  });

  test("where all backups of a known destination are gone, nothing is sent until --adopt says so; of one, nothing either", async () => {
    const { source, snapshots, destination } = days(3);
    await expectRun(0, ["-S", source, destination]);
    sh(`btrfs -q subvolume delete "$1/${day(2)}" >/dev/null`, destination);
    expect(transfers(await expectRun(0, ["--json", "-S", source, destination]))).toEqual([]);
    sh(`btrfs -q subvolume delete "$1"/2* >/dev/null; rm "$1"/.btrfs-backup*`, destination);
    expect((await expectRun(1, ["-S", source, destination])).stderr).toContain(
      "--adopt begins anew",
    );
    expect(existsSync(join(destination, day(3)))).toBe(false);
    await expectRun(0, ["-S", "--adopt", source, destination]);
    expectSound(destination, snapshots);
  });

  test("nor what cannot get its name there, until it can", async () => {
    const { source, snapshots, destination } = days(3);
    sh(`mkdir -p "$1/${day(2)}"`, destination);
    for (const _ of [1, 2]) {
      const result = await expectRun(1, ["--json", "-S", "-N", "1", source, destination]);
      expect(result.stderr).toContain(
        `${day(2)} is not sent: something that is not a subvolume has that name`,
      );
      expect(snapshotNames(snapshots)).toContain(day(2));
    }
    sh(`rmdir "$1/${day(2)}"`, destination);
    await expectRun(0, ["-S", "-N", "1", source, destination]);
    expect(await listed(destination)).toEqual(range(1, 3));
    expect(snapshotNames(snapshots)).toEqual([day(3)]);
  });

  test("but what a run tried to send, and could not, is sent by the next, and stays at the source until then", async () => {
    const { source, snapshots, destination } = days(3);
    const { env } = failing(day(2));
    const first = await expectRun(1, ["--json", "-S", "-N", "1", source, destination], { env });
    expect(transfers(first).map(({ name }) => name)).toEqual([day(1), day(3)]);
    expect(snapshotNames(snapshots)).toEqual([day(2), day(3)]);
    writeFileSync(join(source, "day"), "4");
    snapshotAs(source, day(4));
    const again = await run(["--json", "-S", "-N", "1", source, destination], { env });
    expect([
      again.status,
      transfers(again).map(({ name }) => name),
      snapshotNames(snapshots),
    ]).toEqual([1, [day(4)], [day(2), day(4)]]);
    const last = transfers(await expectRun(0, ["--json", "-S", "-N", "1", source, destination]));
    expect(last.map(({ name, parent }) => [name, parent])).toEqual([[day(2), day(4)]]);
    expect(snapshotNames(snapshots)).toEqual([day(4)]);
    expect(await listed(destination)).toEqual(range(1, 4));
    expect(sh(`cat "$1/${day(2)}/day"`, destination)).toBe("2");
  });
});
