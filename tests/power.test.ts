// The power goes: what stood on the disks at one moment is all that is left. Images on an outer filesystem are cut by a
// snapshot of it, and mounted again; whatever is called whole then has its data.

import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  contentsDigest,
  events,
  expectRun,
  filesystem,
  nextSecond,
  pair,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  treeDigest,
} from "./support/rig.ts";
import { seeded, soak } from "./support/random.ts";

/** Filesystems whose power can be cut: all at the same moment. */
function machines(...names: string[]) {
  const outer = filesystem({ size: "8G", mount: "noatime,nodatacow" });
  const images = subvolume(join(outer.path, "images"));
  const mounts = temporaryDirectory();
  const at = (name: string) => join(mounts, name);
  const mountAll = () => {
    for (const name of names) sh(`mount -o loop,noatime "$1/$2" "$3"`, images, name, at(name));
  };
  for (const name of names) {
    mkdirSync(at(name));
    sh(`truncate -s 600M "$1/$2"; mkfs.btrfs -q "$1/$2" >/dev/null 2>&1`, images, name);
  }
  mountAll();
  /** `last` is done between the cut and the end of the machine that was cut: what it still writes is lost. */
  const cut = (last: () => void) => {
    sh(`btrfs -q subvolume snapshot "$1" "$1.cut" >/dev/null`, images);
    last();
    const uuids = names.map((name) =>
      sh(`btrfs filesystem show "$1" | sed -n 's/.*uuid: //p'`, at(name)),
    );
    for (const name of names)
      sh(
        `for i in $(seq 600); do umount "$1" 2>/dev/null && exit; sleep 0.05; done; umount "$1"`,
        at(name),
      );
    // Until the last process that was behind a fence is gone, the old one lives on, and a new one would get another UUID (temp_fsid).
    for (const uuid of uuids)
      sh(
        `for i in $(seq 600); do [ -e "/sys/fs/btrfs/$1" ] || exit 0; sleep 0.05; done; exit 1`,
        uuid,
      );
    sh(`btrfs -q subvolume delete "$1" >/dev/null; mv "$1.cut" "$1"`, images);
    mountAll();
  };
  const gone = () => {
    for (const name of names) sh(`umount -l "$1" || :`, at(name));
  };
  return { at, cut, gone };
}

/** Whether all that a list calls whole at a place is what its snapshot is. */
async function expectWhole(source: string, place: string): Promise<number> {
  const [{ snapshots, locations }] = events(await run(["list", "--json", source, place])).filter(
    ({ event }) => event === "list",
  ) as [any];
  expect(locations.map(({ error }: any) => error)).toEqual([null, null]);
  const whole = snapshots
    .filter(({ at }: any) => at[0]?.state === "whole" && at[1]?.state === "whole")
    .map(({ name }: any) => name as string);
  for (const name of whole)
    expect([place, name, treeDigest(join(place, name))]).toEqual([
      place,
      name,
      treeDigest(join(source, "snapshot", name)),
    ]);
  return whole.length;
}

test("after a power cut at any moment of a run, copy, prune or restore, what is called whole has its data, and the next one goes on", async () => {
  const random = seeded();
  const { at, cut, gone } = machines("source", "disk", "other");
  try {
    const source = subvolume(join(at("source"), "home"));
    const places = [join(at("disk"), "backup"), join(at("other"), "backup")] as const;
    const stored = join(at("other"), "stored");
    const [copied, restored] = [join(at("other"), "copied"), join(at("source"), "restored")];
    writeFileSync(join(source, "first"), "x");
    const all = ["-n", "3", "-N", "3", source, ...places, `raw://${stored}`, "--full-every", "2"];
    await expectRun(0, all);
    const works: Record<string, readonly string[]> = {
      run: all,
      copy: ["copy", "-n", "3", places[0], copied],
      prune: ["prune", "-n", "1", places[1]],
      restore: ["restore", "--replace", places[0], restored],
    };
    const cuts: Record<string, number> = {};
    for (let round = 0; round < soak(8); round++) {
      const work =
        round % 2 === 0
          ? "run"
          : (["copy", "prune", "restore"][Math.floor(random() * 3)] as string);
      sh(
        `cd "$1"; rm -rf "d$(($2 % 4))"; mkdir "d$(($2 % 4))"; for i in $(seq 60); do head -c 40000 /dev/urandom >"d$(($2 % 4))/$i"; done; head -c 3M /dev/urandom >large`,
        source,
        String(round),
      );
      await nextSecond();
      if (work !== "run") await expectRun(0, all);
      else if (random() < 0.5) {
        // One more transfer, whose announcement replaces that of the first.
        await expectRun(0, ["--no-transfer", source]);
        await nextSecond();
      }
      const running = start(works[work] as string[], { group: true });
      await Promise.race([running.finished, Bun.sleep(Math.floor(random() * 450))]);
      let done = false;
      cut(() => {
        done = running.child.exitCode === 0;
        if (running.child.exitCode === null) cuts[work] = (cuts[work] ?? 0) + 1;
        try {
          process.kill(-running.pid, "SIGKILL");
        } catch {
          // it has ended
        }
        sh(
          `for p in $(pgrep -f "^btrfs (send|receive) |btrfs-backup[:]"); do kill -KILL "$p" 2>/dev/null || :; done`,
        );
      });
      await running.finished;
      for (const place of [...places, copied])
        if (existsSync(place)) await expectWhole(source, place);
      const newest = snapshotNames(join(source, "snapshot")).at(-1) as string;
      // What has said "Done" is on the disk.
      if (done && work === "restore")
        expect(contentsDigest(restored)).toBe(contentsDigest(join(source, "snapshot", newest)));
      await nextSecond();
      const after = events(await expectRun(0, ["--json", ...all]));
      for (const { parent, destination } of after.filter(({ event }) => event === "transfer"))
        if (!destination.startsWith("raw:")) expect(parent).not.toBe(null);
      for (const place of places) expect(await expectWhole(source, place)).toBeGreaterThan(0);
      await expectRun(0, ["verify", `raw://${stored}`]);
      if (work === "run") continue;
      await expectRun(0, works[work] as string[]);
      if (work === "copy") expect(await expectWhole(source, copied)).toBeGreaterThan(0);
      if (work === "restore")
        expect(contentsDigest(restored)).toBe(
          contentsDigest(
            join(source, "snapshot", snapshotNames(join(source, "snapshot")).at(-1) as string),
          ),
        );
    }
    console.log(`cuts in the middle: ${JSON.stringify(cuts)}`);
  } finally {
    gone();
  }
});

describe("what is announced", () => {
  async function announced() {
    const { source, snapshots, destination, b } = pair();
    for (const n of [1, 2]) snapshotAs(source, `2026010${n}-000000`);
    await expectRun(0, ["-S", source, destination]);
    const file = join(destination, ".btrfs-backup.json");
    const uuid = subvolumes(destination).get("20260102-000000")?.uuid;
    /** As if the run had been killed before it took the announcement out. */
    const announce = (since: string) =>
      writeFileSync(
        file,
        readFileSync(file, "utf8").replace(
          `{"owner"`,
          `{"receiving":"20260102-000000","since":${JSON.stringify(since)},"owner"`,
        ),
      );
    const filesystem = sh(`stat -c %i "/sys/fs/btrfs/$1"`, b.uuid);
    const boot = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
    return { source, snapshots, destination, file, uuid, announce, now: `${boot}/${filesystem}` };
  }

  test("and whole, in the same boot and mount, is synced and accepted: nothing is sent twice", async () => {
    const { source, destination, file, uuid, announce, now } = await announced();
    announce(now);
    const again = await expectRun(0, ["--json", "-S", source, destination]);
    expect(events(again).filter(({ event }) => event === "transfer")).toEqual([]);
    expect(subvolumes(destination).get("20260102-000000")?.uuid).toBe(uuid);
    expect(readFileSync(file, "utf8")).not.toContain("receiving");
  });

  test.each([
    ["another boot", "0c0ffee0-0000-0000-0000-000000000000/1"],
    ["nobody knows when", ""],
  ])(
    "and looks whole, but since %s, is no backup: it is removed, and sent again",
    async (_, since) => {
      const { source, snapshots, destination, file, uuid, announce } = await announced();
      announce(since);
      const [{ snapshots: listed }] = events(
        await run(["list", "--json", source, destination]),
      ).filter(({ event }) => event === "list") as [any];
      expect(listed.find(({ name }: any) => name === "20260102-000000").at[1].state).not.toBe(
        "whole",
      );
      // Neither is anything deleted for its sake, nor is it given back.
      await expectRun(1, [
        "restore",
        "--snapshot",
        "20260102-000000",
        destination,
        join(source, "../again"),
      ]);
      const again = await expectRun(0, ["--json", "-S", "-n", "1", source, destination]);
      expect(events(again).filter(({ event }) => event === "transfer")).toMatchObject([
        { name: "20260102-000000", parent: "20260101-000000" },
      ]);
      expect(subvolumes(destination).get("20260102-000000")?.uuid).not.toBe(uuid);
      expect(snapshotNames(destination)).toEqual(["20260102-000000"]);
      expect(treeDigest(join(destination, "20260102-000000"))).toBe(
        treeDigest(join(snapshots, "20260102-000000")),
      );
      expect(readFileSync(file, "utf8")).not.toContain("receiving");
    },
  );

  test("is replaced by that of the next transfer in a row, and taken out after the last: a record is written once for each", async () => {
    const { source, destination } = pair();
    for (const n of [1, 2, 3, 4, 5]) snapshotAs(source, `2026010${n}-000000`);
    const tools = temporaryDirectory();
    const log = join(tools, "log");
    const written = `case "$*" in *" .btrfs-backup.json") grep -q destinations .btrfs-backup.json.new || { sed -n 's/.*{"receiving":"\\([^"]*\\)".*/\\1/p; t; s/.*"owner".*/none/p' .btrfs-backup.json.new; } >>${log};; esac`;
    writeFileSync(join(tools, "mv"), `#!/bin/sh\n${written}\nexec ${sh("command -v mv")} "$@"\n`, {
      mode: 0o755,
    });
    await expectRun(0, ["-S", source, destination], {
      env: { PATH: `${tools}:${process.env["PATH"]}` },
    });
    expect(readFileSync(log, "utf8").trim().split("\n")).toEqual([
      ...[1, 2, 3, 4, 5].map((n) => `2026010${n}-000000`),
      "none",
    ]);
    expect(snapshotNames(destination).length).toBe(5);
    expect(readFileSync(join(destination, ".btrfs-backup.json"), "utf8")).not.toContain(
      "receiving",
    );
  });

  test("is not taken out when the sync fails: the transfer has failed", async () => {
    const { source, destination } = pair();
    const tools = temporaryDirectory();
    writeFileSync(
      join(tools, "btrfs"),
      `#!/bin/sh\ncase "$1 $2" in "filesystem sync") echo "ERROR: no luck" >&2; exit 1;; esac\nexec ${sh("command -v btrfs")} "$@"\n`,
      { mode: 0o755 },
    );
    const { stderr } = await expectRun(1, [source, destination], {
      env: { PATH: `${tools}:${process.env["PATH"]}` },
    });
    expect(stderr).toContain("no luck");
    await nextSecond();
    await expectRun(0, ["-S", source, destination]);
    expect(snapshotNames(destination).length).toBe(1);
    expect(readdirSync(destination).filter((name) => name.startsWith("2")).length).toBe(1);
  });
});
