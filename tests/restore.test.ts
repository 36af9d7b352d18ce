// The day of the loss: everything comes back, exactly, whatever interrupts it, and the next backup
// goes on where the last one stopped.

import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSameTree,
  expectSound,
  filesystem,
  holdLock,
  mountImage,
  nextSecond,
  pair,
  pathWith,
  reformat,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  transfers,
  unmount,
  waitFor,
} from "./support/rig.ts";
import { generator, seeded, soak } from "./support/random.ts";

/** Backs up, with changes in between; what the source held each time, by the snapshot's name. */
async function history(
  times: number,
  args: readonly string[],
  source: string,
  seed = 3,
): Promise<Map<string, string>> {
  const random = generator(seed);
  const states = new Map<string, string>();
  for (let i = 0; i < times; i++) {
    if (i > 0) await nextSecond();
    const name = events(await expectRun(0, ["--json", ...args])).find(
      ({ event }) => event === "snapshot",
    )?.["name"];
    states.set(name, contentsDigest(source));
    change(source, random);
  }
  return states;
}

/** What every restored subvolume is: writable, as it was, with the one read-only snapshot that it came from. */
function expectRestored(
  target: string,
  name: string,
  state: string | undefined,
  folder = join(target, "snapshot"),
): void {
  expect(contentsDigest(target)).toBe(state as string);
  expect(subvolumes(dirname(target)).get(basename(target))).toMatchObject({
    readonly: false,
    receivedUuid: null,
  });
  expect(subvolumes(folder).get(name)).toMatchObject({ readonly: true });
  expect(readdirSync(dirname(target)).filter((entry) => entry.includes(".restoring-"))).toEqual([]);
}

/** No received UUID stands twice on a filesystem. */
function expectNoDuplicates(path: string): void {
  const received = sh(
    `btrfs subvolume list -R "$1" | sed -n 's/.*received_uuid \\([0-9a-f-]*[0-9a-f]\\) .*/\\1/p'`,
    path,
  )
    .split("\n")
    .filter((uuid) => uuid.length > 1);
  expect(received).toEqual([...new Set(received)]);
}

test("the newest is what was made last, whatever clocks and time zones made of its name", async () => {
  const env = { TZ: "Europe/Berlin" };
  // One run with a clock that is years ahead; the hour that comes twice; a flight to the west, with the zone of the ticket.
  for (const [i, [before, after]] of [
    ["20361123-051100", null],
    ["20241027-025000", "20241027-021000"],
    ["20240601-140000", "20240601-090000"],
  ].entries()) {
    const { source, destination, a, b } = pair();
    const places = [destination, `raw://${temporaryDirectory()}/s`];
    const send = () => expectRun(0, ["-S", "-q", source, ...places], { env });
    snapshotAs(source, "20240101-000000");
    snapshotAs(source, before as string);
    await send();
    writeFileSync(join(source, "important"), "yes");
    if (after !== null) snapshotAs(source, after as string);
    await (after === null ? expectRun(0, ["-q", source, ...places], { env }) : send());
    const [newest] = snapshotNames(join(source, "snapshot")).filter((name) =>
      existsSync(join(source, "snapshot", name as string, "important")),
    );
    for (const [j, place] of places.entries()) {
      const target = join(a.path, `again${j}`);
      await expectRun(0, ["restore", place, target], { env });
      expect([i, j, existsSync(join(target, "important"))]).toEqual([i, j, true]);
    }
    const other = join(filesystem().path, "other");
    await expectRun(0, ["copy", "-q", "--newest-only", destination, other], { env });
    expect([i, snapshotNames(other)]).toEqual([i, [newest as string]]);
    for (const one of [a, b]) unmount(one);
  }
});

test("the whole disaster over ssh: three backups, mkfs, restore, and the next backup is incremental", async () => {
  const { source, snapshots, destination, a } = pair();
  const { options, url } = await sshServer();
  const states = await history(3, [...options, source, url(destination)], source);
  const [name = "", state] = [...states].at(-1) ?? [];
  reformat(a);
  const restored = await expectRun(0, ["restore", "--json", ...options, url(destination), source]);
  expect(events(restored)).toMatchObject([
    { event: "transfer", name, parent: null },
    { event: "restore", name, target: source, before: null },
    { event: "summary", ok: true },
  ]);
  expectRestored(source, name, state);
  expectNoDuplicates(a.path);
  change(source, generator(9));
  await nextSecond();
  const next = transfers(await expectRun(0, ["--json", ...options, source, url(destination)]));
  expect(next).toMatchObject([{ parent: name }]);
  expect(next[0]?.["bytes"]).toBeLessThan(1 << 20);
  const newest = snapshotNames(snapshots).at(-1) ?? "";
  expectSameTree(join(snapshots, newest), join(destination, newest));
});

test("to another host, and from there to a third place", async () => {
  const { source, destination, b } = pair();
  const other = filesystem();
  const { options, url } = await sshServer();
  const states = await history(2, [source, destination], source);
  const [name = "", state] = [...states].at(-1) ?? [];
  const target = join(other.path, "home");
  const { stderr } = await expectRun(0, ["restore", ...options, destination, url(target)]);
  expectRestored(target, name, state);
  expect(stderr).toContain(`btrfs-backup --adopt ${url(target)} ${destination}`);
  await expectRun(0, ["restore", ...options, url(destination), url(join(other.path, "again"))]);
  expectRestored(join(other.path, "again"), name, state);
  // Another place than before: refused, unless it takes over, and then it goes on incrementally.
  expect((await expectRun(1, [...options, url(target), destination])).stderr).toContain(
    "belong to",
  );
  await nextSecond();
  expect(
    transfers(await expectRun(0, ["--json", "--adopt", ...options, url(target), destination]))[0],
  ).toMatchObject({ parent: name });
  expectNoDuplicates(b.path);
});

test("each of ten backups taken around random changes comes back as it was", async () => {
  const { source, destination, b } = pair();
  const other = filesystem();
  const states = await history(10, [source, destination], source, seeded()() * 2 ** 32);
  expect(states.size).toBe(10);
  for (const [name, state] of states) {
    await expectRun(0, [
      "restore",
      "--snapshot",
      name,
      destination,
      join(other.path, name, "..", `of-${name}`),
    ]);
    expectRestored(join(other.path, `of-${name}`), name, state);
  }
  expect(subvolumes(b.path).size).toBe(0);
}, 300_000);

describe("which backup", () => {
  const { source, destination } = pair();
  const target = join(filesystem().path, "home");
  for (const name of [
    "20260101-120000",
    "20260102-120000",
    "20260103-120000",
    "x-20260105-120000",
  ]) {
    writeFileSync(join(source, "name"), name);
    snapshotAs(source, name);
  }
  const restore = async (...args: string[]) => {
    await expectRun(0, ["restore", ...args, destination, target]);
    const name = readFileSync(join(target, "name"), "utf8");
    sh(`btrfs -q subvolume delete "$1"/snapshot/*-* "$1" >/dev/null`, target);
    return name;
  };

  test.each<[string[], string]>([
    [[], "20260103-120000"],
    [["--snapshot", "20260101-120000"], "20260101-120000"],
    [["--before", "2026-01-03 12:00:00"], "20260103-120000"],
    [["--before", "2026-01-03 11:59"], "20260102-120000"],
    [["--before", "2026-01-03"], "20260102-120000"],
    [["-p", ""], "20260103-120000"],
  ])("%j", async (args, expected) => {
    await expectRun(0, ["-S", source, destination]);
    expect(await restore(...args)).toBe(expected);
  });

  test.each<[number, string[], RegExp]>([
    [
      1,
      ["--before", "2025-12-31"],
      /nothing from that time or before; it has 3 snapshots from 20260101-120000 to 20260103-120000/,
    ],
    [
      1,
      ["--snapshot", "20260104-000000"],
      /no complete snapshot 20260104-000000; it has 3 snapshots/,
    ],
    [2, ["--before", "yesterday"], /"yesterday" is no time/],
    [2, ["--before", "2026-02-30"], /is no time/],
    [2, ["--before", "2026-01-03", "--snapshot", "20260101-120000"], /exclude/],
  ])("exit %i: %j", async (status, args, message) => {
    expect((await expectRun(status, ["restore", ...args, destination, target])).stderr).toMatch(
      message,
    );
    expect(existsSync(target)).toBe(false);
  });

  test("several prefixes are listed, exit 2; with -p it is one of them", async () => {
    await expectRun(0, ["-S", "-p", "x-", source, destination]);
    expect((await expectRun(2, ["restore", destination, target])).stderr).toMatch(/"", "x-"/);
    expect(await restore("-p", "x-")).toBe("x-20260105-120000");
  });

  test("one prefix is found without -p", async () => {
    const only = join(dirname(destination), "only");
    await expectRun(0, ["-S", "-p", "x-", source, only]);
    await expectRun(0, ["restore", only, target]);
    expect(readFileSync(join(target, "name"), "utf8")).toBe("x-20260105-120000");
    expect(existsSync(join(target, "snapshot/.btrfs-backup.x-.lock"))).toBe(false); // nothing but what is needed
    sh(`btrfs -q subvolume delete "$1"/snapshot/*-* "$1" >/dev/null`, target);
  });

  test("an incomplete one is never taken, a protected one by its new name is", async () => {
    sh(
      `btrfs -q subvolume create "$1/20270101-000000" >/dev/null; mv "$1/20260101-120000" "$1/before-the-upgrade"`,
      destination,
    );
    expect(await restore("-p", "")).toBe("20260103-120000");
    expect(
      (
        await expectRun(1, [
          "restore",
          "-p",
          "",
          "--snapshot",
          "20270101-000000",
          destination,
          target,
        ])
      ).stderr,
    ).toContain("no complete snapshot");
    await expectRun(0, [
      "restore",
      "-p",
      "",
      "--snapshot",
      "before-the-upgrade",
      destination,
      target,
    ]);
    expect(readFileSync(join(target, "name"), "utf8")).toBe("20260101-120000");
    expect(subvolumes(join(target, "snapshot")).get("before-the-upgrade")).toMatchObject({
      readonly: true,
    });
  });
});

test("a dry run says what would happen, and changes nothing", async () => {
  const { source, destination, a } = pair();
  await history(2, [source, destination], source);
  const all = () =>
    sh(
      `btrfs subvolume list -u -q -R "$1"; find "$@" -inum 2 -prune -o -printf '%p %y %s %m %C@ %T@\n'`,
      a.path,
      destination,
    );
  const before = all();
  const dry = await expectRun(0, [
    "restore",
    "--dry-run",
    "--json",
    destination,
    join(a.path, "new"),
  ]);
  expect(events(dry)).toMatchObject([
    { event: "restore", dry_run: true },
    { event: "summary", ok: true },
  ]);
  expect(
    (await expectRun(0, ["restore", "--dry-run", "--replace", source, source])).stderr,
  ).toMatch(/Would restore .* \(reflinked, nothing is sent\)\n.*Would move 2 snapshots/);
  expect(all()).toBe(before);
});

describe("what TARGET can be", () => {
  const { source, destination, a } = pair();
  const plain = temporaryDirectory();

  test("something that exists is left alone", async () => {
    await expectRun(0, [source, destination]);
    mkdirSync(join(a.path, "directory"));
    writeFileSync(join(a.path, "file"), "x");
    sh(`ln -s nowhere "$1/link"`, a.path);
    for (const [target, message] of [
      [source, "--replace"],
      [join(a.path, "directory"), "not a subvolume"],
      [join(a.path, "file"), "not a subvolume"],
      [join(a.path, "link"), "not a subvolume"],
      [join(plain, "home"), "not on btrfs"],
      [join(a.path, "missing/home"), "no such directory"],
      [join(a.path, "file/home"), "not a directory"],
    ] as const)
      expect([
        target,
        (
          await expectRun(1, ["restore", destination, target]).catch(() =>
            expectRun(2, ["restore", destination, target]),
          )
        ).stderr,
      ]).toEqual([target, expect.stringContaining(message)]);
    expect(
      (await expectRun(1, ["restore", "--replace", destination, join(a.path, "directory")])).stderr,
    ).toContain("not a subvolume");
    expect(readdirSync(a.path).sort()).toEqual(["directory", "file", "home", "link"]);
  });

  test("at a mount point whose top level cannot be mounted, the advice names the device and the subvolume, and works", async () => {
    const top = temporaryDirectory();
    const at = temporaryDirectory();
    const device = sh(`findmnt -no SOURCE "$1"`, a.path);
    sh(`mount -o subvol=home "$1" "$2"`, device, at);
    try {
      const tools = temporaryDirectory();
      writeFileSync(
        join(tools, "mount"),
        `#!/bin/sh\ncase $* in *subvolid=5*) echo "not here" >&2; exit 32;; esac\nexec /usr/bin/mount "$@"\n`,
        { mode: 0o755 },
      );
      for (const args of [["--replace"], ["--replace", "--dry-run"]]) {
        const { stderr } = await expectRun(1, ["restore", ...args, destination, at], {
          env: pathWith(tools),
        });
        expect(stderr).toContain(`${at} is a mount point, of the subvolume home of ${device}`);
        expect(stderr).toContain(`mount -o subvolid=5 '${device}' /mnt`);
        expect(stderr).toContain("not here");
        expect(stderr).toContain(`btrfs-backup restore --replace '${destination}' '/mnt/home'`);
        expect(stderr).toContain(`umount '${at}' && mount '${at}'`);
      }
      expect((await expectRun(1, ["restore", destination, a.path])).stderr).toContain(
        "btrfs subvolume set-default /mnt/restored",
      );
      // The same commands, with another directory than /mnt.
      writeFileSync(join(at, "lost"), "x");
      sh(`mount -o subvolid=5 "$1" "$2"`, device, top);
      await expectRun(0, ["restore", "--replace", destination, join(top, "home")]);
      sh(`umount "$1"; mount -o subvol=home "$2" "$1"`, at, device);
      expect(existsSync(join(at, "lost"))).toBe(false);
      expect(existsSync(join(at, "plain/deep"))).toBe(true);
    } finally {
      sh(`for m in "$@"; do while mountpoint -q "$m"; do umount -l "$m"; done; done`, top, at);
    }
  });

  test("something mounted below TARGET is not moved away with it", async () => {
    const other = filesystem();
    mkdirSync(join(source, "below"));
    sh(`mount --bind "$1" "$2"`, other.path, join(source, "below"));
    expect((await expectRun(1, ["restore", "--replace", destination, source])).stderr).toContain(
      "unmount it first",
    );
    sh(`umount "$1"`, join(source, "below"));
  });

  test("a symbolic link in the backup leads nowhere", async () => {
    const [evil, elsewhere] = [subvolume(join(a.path, "evil")), temporaryDirectory()];
    await expectRun(
      0,
      ["-f", join(a.path, "snapshots"), evil, join(dirname(destination), "evil")].toSpliced(
        0,
        0,
        ...(mkdirSync(join(a.path, "snapshots")), []),
      ),
    );
    sh(`ln -s "$2" "$1/snapshot"`, evil, elsewhere);
    await nextSecond();
    await expectRun(0, ["-f", join(a.path, "snapshots"), evil, join(dirname(destination), "evil")]);
    expect(
      (await expectRun(1, ["restore", join(dirname(destination), "evil"), join(a.path, "victim")]))
        .stderr,
    ).toContain("not a plain folder");
    expect(readdirSync(elsewhere)).toEqual([]);
    expect(readdirSync(a.path).filter((entry) => entry.startsWith("victim"))).toEqual([]);
  });
});

test("--replace keeps the old one beside it, says how to remove it, and that works", async () => {
  const { source, destination, a } = pair();
  const states = await history(2, [source, destination], source);
  const [first = "", state] = [...states][0] ?? [];
  writeFileSync(join(source, "not backed up"), "x");
  const { stderr } = await expectRun(0, [
    "restore",
    "--replace",
    "--snapshot",
    first,
    destination,
    source,
  ]);
  expectRestored(source, first, state);
  const before =
    readdirSync(a.path).find((entry) => /^home\.before-\d{8}-\d{6}$/.test(entry)) ?? "";
  expect(readFileSync(join(a.path, before, "not backed up"), "utf8")).toBe("x");
  const command = /When you do not need it any more: (.*)/.exec(stderr)?.[1] ?? "";
  expect(command).toStartWith("btrfs subvolume delete ");
  sh(command);
  expect(readdirSync(a.path)).toEqual(["home"]);
  await nextSecond();
  expect(transfers(await expectRun(0, ["--json", source, destination]))).toMatchObject([
    { parent: first },
  ]);
  expectNoDuplicates(a.path);
});

test("only the difference travels when the target filesystem has a snapshot in common", async () => {
  const { source, snapshots, destination, a } = pair();
  sh(`head -c 5M /dev/urandom >"$1/large"`, source);
  const states = await history(3, [source, destination], source);
  const [[,], [middle = "", state]] = [...states] as [[string, string], [string, string]];
  const names = [...states.keys()];
  // In its snapshot folder: the old TARGET's.
  const replaced = transfers(
    await expectRun(0, [
      "restore",
      "--json",
      "--replace",
      "--snapshot",
      middle,
      destination,
      source,
    ]),
  );
  expect(replaced).toMatchObject([{ name: middle, parent: middle }]); // it is there itself, under its own UUID
  expect(replaced[0]?.["bytes"]).toBeLessThan(10_000);
  expectRestored(source, middle, state);
  // Where --parent-from says.
  const old = readdirSync(a.path).find((entry) => entry.includes(".before-")) ?? "";
  const [named] = transfers(
    await expectRun(0, [
      "restore",
      "--json",
      "--snapshot",
      names[2] ?? "",
      "--parent-from",
      join(a.path, old, "snapshot"),
      destination,
      join(a.path, "other"),
    ]),
  );
  expect(named).toMatchObject({ parent: names[2] });
  expectRestored(join(a.path, "other"), names[2] ?? "", states.get(names[2] ?? ""));
  // In TARGET's parent directory.
  const flat = filesystem();
  sh(`btrfs send -q "$1" | btrfs receive -q "$2"`, join(destination, names[0] ?? ""), flat.path);
  const [beside] = transfers(
    await expectRun(0, [
      "restore",
      "--json",
      "--snapshot",
      middle,
      destination,
      join(flat.path, "home"),
    ]),
  );
  expect(beside).toMatchObject({ parent: names[0] });
  expectRestored(join(flat.path, "home"), middle, state);
  // Later ones serve as well, and what was there already is not sent again.
  const again = await expectRun(0, [
    "restore",
    "--json",
    "--snapshot",
    middle,
    "--parent-from",
    join(flat.path, "home/snapshot"),
    destination,
    join(flat.path, "again"),
  ]);
  expect(transfers(again)).toEqual([]);
  expectRestored(join(flat.path, "again"), middle, state);
  expect(again.stderr).not.toContain("received UUID");
  expect(
    (
      await expectRun(
        0,
        ["-S", join(flat.path, "again"), join(a.path, "x")].toSpliced(0, 1, "--dry-run"),
      )
    ).stderr,
  ).toContain("the same received UUID");
  expect(
    (
      await expectRun(2, [
        "restore",
        "--parent-from",
        snapshots,
        destination,
        join(flat.path, "third"),
      ])
    ).stderr,
  ).toContain("not on the filesystem");
}, 120_000);

describe("going back in time from the source's own snapshots", () => {
  test("with --replace all snapshots move along, and every destination goes on incrementally", async () => {
    const { source, snapshots, destination, a, b } = pair();
    const third = filesystem();
    const out = temporaryDirectory();
    const shell = `shell://cat >${out}/$BTRFS_BACKUP_NAME.$BTRFS_BACKUP_KIND`;
    const places = [destination, join(third.path, "backup"), shell];
    const states = await history(2, [source, ...places], source);
    await nextSecond();
    for (const [name, state] of await history(1, [source, destination, shell], source, 5))
      states.set(name, state); // the third place is behind
    await expectRun(0, ["-p", "other-", source, join(b.path, "other")]);
    const uuids = new Map([...subvolumes(snapshots)].map(([name, { uuid }]) => [name, uuid]));
    const [first = ""] = states.keys();
    const { stderr } = await expectRun(0, [
      "restore",
      "-p",
      "",
      "--replace",
      "--snapshot",
      first,
      source,
      source,
    ]);
    expect(stderr).toContain("Moving 4 snapshots");
    expectRestored(source, first, states.get(first));
    expect(new Map([...subvolumes(snapshots)].map(([name, { uuid }]) => [name, uuid]))).toEqual(
      uuids,
    );
    expect([...subvolumes(snapshots).values()].every(({ readonly }) => readonly)).toBe(true);
    for (let i = 0; i < 2; i++) {
      change(source, generator(i));
      await nextSecond();
      const sent = transfers(
        await expectRun(0, ["--json", "-N", "1", "-n", "2", source, ...places].toSpliced(3, 2)),
      );
      for (const transfer of sent)
        expect([transfer["destination"], typeof transfer["parent"]]).toEqual([
          transfer["destination"],
          "string",
        ]);
      expect(sent.length).toBeGreaterThanOrEqual(3);
    }
    await nextSecond();
    expect(
      transfers(await expectRun(0, ["--json", "-p", "other-", source, join(b.path, "other")])),
    ).toMatchObject([{ parent: expect.stringContaining("other-") }]);
    const newest = snapshotNames(snapshots).at(-1) ?? "";
    for (const place of places.slice(0, 2))
      expectSameTree(join(snapshots, newest), join(place, newest));
    expect(readdirSync(out).filter((file) => file.endsWith(".full")).length).toBe(1);
    sh(`btrfs -q subvolume delete "$1"/home.before-* >/dev/null`, a.path);
  }, 120_000);

  test("again and again, also after a disaster: the order of what came back is kept", async () => {
    const { source, snapshots, destination, a } = pair();
    await history(2, [source, destination], source);
    reformat(a);
    await expectRun(0, ["restore", destination, source]); // one snapshot with a received UUID
    for (let i = 0; i < 3; i++) {
      await nextSecond();
      await expectRun(0, ["-q", source, destination]);
      const names = snapshotNames(snapshots);
      await nextSecond();
      await expectRun(0, [
        "restore",
        "--replace",
        "--snapshot",
        names.at(-2) ?? "",
        snapshots,
        source,
      ]);
      expect(snapshotNames(snapshots)).toEqual(names);
      change(source, generator(i));
      await nextSecond();
      const [sent, ...more] = transfers(await expectRun(0, ["--json", source, destination]));
      // What it was made of, or what is nearer, if nothing is lost so.
      expect([names.slice(-2).includes(String(sent?.["parent"])), more]).toEqual([true, []]);
      expectSound(destination, snapshots);
      expectNoDuplicates(a.path);
      sh(`btrfs -q subvolume delete "$1"/home.before-* >/dev/null`, a.path);
    }
    const newest = snapshotNames(snapshots).at(-1) ?? "";
    expectSameTree(join(snapshots, newest), join(destination, newest));
  }, 120_000);

  test("beside the source: what destinations share moves along, and it says so", async () => {
    const { source, snapshots, destination, a } = pair();
    const states = await history(3, [source, destination], source);
    const [first = "", second = "", third = ""] = states.keys();
    const target = join(a.path, "new");
    const { stderr } = await expectRun(0, ["restore", "--snapshot", first, source, target]);
    expectRestored(target, first, states.get(first));
    expect(snapshotNames(join(target, "snapshot"))).toEqual([first, third]);
    expect(snapshotNames(snapshots)).toEqual([second]);
    expect(stderr).toContain("they go on from");
    sh(`btrfs -q subvolume delete "$1"/snapshot/* "$1" >/dev/null; mv "$2" "$1"`, source, target);
    await nextSecond();
    expect(transfers(await expectRun(0, ["--json", source, destination]))).toMatchObject([
      { parent: first },
    ]);
  });

  test("without destinations nothing moves, and there is no copy", async () => {
    const { source, snapshots, a } = pair();
    await expectRun(0, [source]);
    const [name = ""] = snapshotNames(snapshots);
    const target = join(a.path, "new");
    await expectRun(0, ["restore", source, target]);
    expectSameTree(join(snapshots, name), join(target, "snapshot", name));
    expect(snapshotNames(snapshots)).toEqual([name]);
    expect(sh(`btrfs filesystem du -s --raw "$1/plain" | awk 'NR == 2 { print $2 }'`, target)).toBe(
      "0",
    ); // nothing of its own
    // What was nested in the source is a stub in its snapshot, which must not stand in the way.
    await nextSecond();
    await expectRun(0, [source]);
    await expectRun(0, [
      "restore",
      "--snapshot",
      snapshotNames(snapshots)[1] ?? "",
      source,
      join(a.path, "newer"),
    ]);
    expect(
      readdirSync(join(a.path, "newer/snapshot")).filter((entry) => entry.startsWith("2")),
    ).toEqual([snapshotNames(snapshots)[1] ?? ""]);
  });

  test("with the snapshot folder outside: only the record changes hands", async () => {
    const { source, destination, a } = pair();
    const folder = join(a.path, "snapshots");
    mkdirSync(folder);
    const states = await history(2, ["-f", folder, source, destination], source);
    const [first = "", second = ""] = states.keys();
    sh(`btrfs -q subvolume delete "$1" >/dev/null`, source);
    await expectRun(0, ["restore", "-f", folder, "--snapshot", first, folder, source]);
    expectRestored(source, first, states.get(first), folder);
    expect(snapshotNames(folder)).toEqual([first, second]);
    await nextSecond();
    expect(
      transfers(await expectRun(0, ["--json", "-f", folder, source, destination])),
    ).toMatchObject([{ parent: first }]);
    // Rolled back by hand, it is as much the same source.
    sh(
      `btrfs -q subvolume delete "$1" >/dev/null; btrfs -q subvolume snapshot "$2" "$1" >/dev/null`,
      source,
      join(folder, second),
    );
    await nextSecond();
    expect(
      transfers(await expectRun(0, ["--json", "-f", folder, source, destination])),
    ).toMatchObject([{ parent: second }]);
    sh(
      `btrfs -q subvolume delete "$1" >/dev/null; btrfs -q subvolume create "$1" >/dev/null`,
      source,
    );
    expect((await expectRun(1, ["-f", folder, source, destination])).stderr).toContain("belong to");
  });

  test("of another host: they are received, and nothing is remembered as if it were a destination", async () => {
    const { source, destination } = pair();
    const { options, url } = await sshServer();
    const states = await history(1, [source, destination], source);
    const [[name, state]] = [...states] as [[string, string]];
    const target = join(filesystem().path, "home");
    expect(
      transfers(await expectRun(0, ["restore", "--json", ...options, url(source), target])),
    ).toMatchObject([{ parent: null }]);
    expectRestored(target, name, state);
    expect(readFileSync(join(target, "snapshot/.btrfs-backup.json"), "utf8")).not.toContain(
      "ssh://",
    );
    expect(snapshotNames(join(source, "snapshot"))).toEqual([name]);
  });
});

test("with the snapshot folder outside TARGET, a backup's snapshot stands there", async () => {
  const { source, destination, a } = pair();
  const folder = join(a.path, "snapshots");
  mkdirSync(folder);
  const states = await history(2, ["-f", folder, source, destination], source);
  reformat(a);
  mkdirSync(folder);
  await expectRun(0, ["restore", "-f", folder, destination, source]);
  const name = [...states.keys()].at(-1) ?? "";
  expectRestored(source, name, states.get(name), folder);
  await nextSecond();
  expect(
    transfers(await expectRun(0, ["--json", "-f", folder, source, destination])),
  ).toMatchObject([{ parent: name }]);
});

test("an old record in the restored tree misleads nobody", async () => {
  const { source, snapshots, destination, a } = pair();
  const other = filesystem();
  const out = temporaryDirectory();
  const shell = `shell://cat >${out}/$BTRFS_BACKUP_NAME.$BTRFS_BACKUP_KIND`;
  const places = [destination, join(other.path, "backup"), shell];
  const states = await history(3, [source, ...places], source);
  const name = [...states.keys()].at(-1) ?? "";
  reformat(a);
  await expectRun(0, ["restore", destination, source]);
  const record = JSON.parse(readFileSync(join(snapshots, ".btrfs-backup.json"), "utf8"))[""];
  const uuid = subvolumes(snapshots).get(name)?.uuid;
  expect(
    new Map(
      record.destinations.map((d: Record<string, any>) => [d["location"], d["pin"]?.uuid ?? null]),
    ),
  ).toEqual(
    new Map([
      [destination, uuid],
      [places[1] as string, null],
      [shell, null],
    ] as never),
  );
  await nextSecond();
  // The other place has not been seen: nothing is deleted until it is.
  unmount(other);
  await expectRun(1, ["-N", "1", source, destination, places[1] ?? ""]);
  expect(snapshotNames(snapshots)).toContain(name);
  mountImage(other);
  await nextSecond();
  const result = transfers(await expectRun(0, ["--json", source, ...places]));
  expect(result.filter(({ destination: to }) => to === shell)).toMatchObject([{ parent: null }]); // the newest, in full
  expect(result.filter(({ destination: to }) => to === places[1])).toMatchObject([
    { parent: name },
    { parent: expect.any(String) },
  ]);
});

test("unpinned and pruned: what the place it came from shares is kept for it", async () => {
  const { source, snapshots, destination, a } = pair();
  const other = filesystem();
  await history(2, ["-f", "snapshot", source, destination], source);
  reformat(a);
  const { stderr } = await expectRun(0, ["restore", destination, source]);
  expect(stderr).not.toContain("--adopt");
  const [name = ""] = snapshotNames(snapshots);
  for (let i = 0; i < 2; i++) {
    await nextSecond();
    await expectRun(0, ["-N", "1", source, join(other.path, "backup")]);
  }
  expect(snapshotNames(snapshots)).toContain(name);
});

test("a backup disk that is mounted read-only gives back as well", async () => {
  const { source, destination, a, b } = pair();
  const states = await history(1, [source, destination], source);
  const [[name, state]] = [...states] as [[string, string]];
  sh(`mount -o remount,ro "$1"`, b.path);
  await expectRun(0, ["restore", destination, join(a.path, "new")]);
  expectRestored(join(a.path, "new"), name, state);
});

test("on the filesystem of the backups themselves: no copy, and no received UUID twice", async () => {
  const { source, destination, b } = pair();
  const states = await history(1, [source, destination], source);
  const [[name, state]] = [...states] as [[string, string]];
  const result = await expectRun(0, ["restore", "--json", destination, join(b.path, "look")]);
  expect(transfers(result)).toEqual([]);
  expectRestored(join(b.path, "look"), name, state);
  expectNoDuplicates(b.path);
  expect(
    (await expectRun(2, ["restore", join(destination, name), join(b.path, "no")])).stderr,
  ).toContain("is a snapshot itself");
});

describe("what must not be lost", () => {
  test("snapshots that are being sent, or are locked, keep a restore from beginning; nothing was moved", async () => {
    const { source, snapshots, destination } = pair();
    await expectRun(0, [source, destination]);
    await expectRun(0, ["-p", "other-", source, destination]);
    sh(`head -c 20M /dev/urandom >"$1/large"`, source);
    await nextSecond();
    await expectRun(0, [source]);
    const all = readdirSync(snapshots).filter((entry) => /\d{8}/.test(entry));
    const newest = snapshotNames(snapshots).at(-1) ?? "";
    const holder = sh(
      `mkfifo "$1/pipe"; exec 3<>"$1/pipe"; btrfs send -q "$2" >&3 2>/dev/null & p=$!; disown; head -c 1 <&3 >/dev/null; echo $p`,
      temporaryDirectory(),
      join(snapshots, newest),
    );
    const { stderr } = await expectRun(1, ["restore", "-p", "", "--replace", source, source]);
    expect(stderr).toContain("cannot finish");
    sh(`kill "$1"; while kill -0 "$1" 2>/dev/null; do sleep 0.05; done`, holder);
    const release = await holdLock(`${snapshots}/.btrfs-backup.other-.lock`);
    await expectRun(3, ["restore", "-p", "", "--replace", source, source]);
    await release();
    expect(readdirSync(snapshots).filter((entry) => /\d{8}/.test(entry))).toEqual(all);
    expect(readdirSync(dirname(source)).filter((entry) => /before|restoring/.test(entry))).toEqual(
      [],
    );
    sh(`btrfs property set -ts "$1" ro true`, source);
    expect(
      (await expectRun(1, ["restore", "-p", "", "--replace", source, source])).stderr,
    ).toContain("is read-only");
    sh(`btrfs property set -ts "$1" ro false`, source);
    await expectRun(0, ["restore", "-p", "", "--replace", source, source]);
    expect(readdirSync(snapshots).filter((entry) => /\d{8}/.test(entry))).toEqual(all);
    await nextSecond();
    for (const prefix of ["", "other-"])
      expect(
        transfers(await expectRun(0, ["--json", "-p", prefix, source, destination]))[0]?.["parent"],
      ).toStartWith(prefix + "20");
  });

  test("backups inside of TARGET are not moved away", async () => {
    const { source, b } = pair();
    const folder = subvolume(join(b.path, "folder"));
    await expectRun(0, [source, folder]);
    expect((await expectRun(2, ["restore", "--replace", folder, folder])).stderr).toContain(
      "would be moved away",
    );
    expect(snapshotNames(folder).length).toBe(1);
  });

  test("a test restore takes nothing from a source that lives, whose snapshot folder is outside", async () => {
    const { source, destination, a } = pair();
    const folder = join(a.path, "snapshots");
    mkdirSync(folder);
    await history(2, ["-f", folder, source, destination], source);
    await expectRun(0, ["restore", "-f", "../snapshots", folder, join(a.path, "test")]);
    await nextSecond();
    expect(
      transfers(await expectRun(0, ["--json", "-f", folder, source, destination]))[0]?.["parent"],
    ).toStartWith("20");
    // Its own newest state is there already, and has the name: nothing is sent.
    const names = snapshotNames(folder);
    expect(
      transfers(
        await expectRun(0, ["restore", "--json", "--replace", "-f", folder, destination, source]),
      ),
    ).toEqual([]);
    expect(snapshotNames(folder)).toEqual(names);
    await nextSecond();
    expect(
      transfers(await expectRun(0, ["--json", "-f", folder, source, destination])),
    ).toMatchObject([{ parent: names.at(-1) }]);
  });

  test("a snapshot folder that is a subvolume", async () => {
    const { source, destination, a } = pair();
    const folder = subvolume(join(source, ".snapshots"));
    for (let i = 0; i < 2; i++) {
      await expectRun(0, ["-f", ".snapshots", source, destination]);
      await nextSecond();
    }
    const names = snapshotNames(folder);
    await expectRun(0, ["restore", "-f", ".snapshots", "--replace", source, source]);
    expect(snapshotNames(folder)).toEqual(names);
    expect(
      transfers(await expectRun(0, ["--json", "-f", ".snapshots", source, destination])),
    ).toMatchObject([{ parent: names[1] }]);
    await expectRun(0, ["restore", folder, join(a.path, "plain")]);
    await nextSecond();
    await expectRun(0, ["-f", ".snapshots", join(a.path, "plain")]);
  });

  test("what is not whole is not given back, whatever its name; two that are the same are told", async () => {
    const { source, snapshots, destination, a } = pair();
    await expectRun(0, [source, destination]);
    sh(
      `btrfs -q subvolume create "$1/x" >/dev/null; btrfs -q subvolume snapshot -r "$1/x" "$1/kept" >/dev/null`,
      destination,
    );
    expect(
      (await expectRun(1, ["restore", "--snapshot", "kept", destination, join(a.path, "new")]))
        .stderr,
    ).toContain("no complete snapshot kept");
    const other = filesystem();
    await expectRun(0, ["restore", destination, join(other.path, "one")]);
    expect(
      (await expectRun(0, ["restore", destination, join(other.path, "two")])).stderr,
    ).toContain("stands twice");
    expect(
      (
        await expectRun(0, [
          "restore",
          "--parent-from",
          other.path,
          destination,
          join(other.path, "three"),
        ])
      ).stderr,
    ).toContain("nothing there is shared");
    expect(snapshotNames(snapshots).length).toBe(1);
  });
});

test("names that could be syntax", async () => {
  const { source, a, b } = pair();
  const { options, url } = await sshServer();
  const odd = `-n 'a' "b" $(c) \`d\` \\ ! ü`;
  const states = await history(1, [source, `${b.path}/${odd}`], source);
  const [[name, state]] = [...states] as [[string, string]];
  await expectRun(0, ["restore", `${b.path}/${odd}`, `${a.path}/${odd}`]);
  expectRestored(`${a.path}/${odd}`, name, state);
  await nextSecond();
  await expectRun(0, [
    "restore",
    ...options,
    "--replace",
    url(`${b.path}/${odd}`),
    url(`${a.path}/${odd}`),
  ]);
  expectRestored(`${a.path}/${odd}`, name, state);
});

describe("interruptions", () => {
  test("kill -9 at random moments: TARGET is complete or not there, and the next restore cleans up", async () => {
    const random = seeded();
    const { source, destination, a, b } = pair();
    sh(`head -c 30M /dev/urandom >"$1/large"`, source);
    const states = await history(2, [source, destination], source);
    const name = [...states.keys()].at(-1) ?? "";
    const target = join(a.path, "new");
    const began = Date.now();
    await expectRun(0, ["restore", destination, target]);
    const takes = Date.now() - began;
    const remove = () =>
      sh(`[ ! -e "$1" ] || btrfs -q subvolume delete "$1"/snapshot/2* "$1" >/dev/null`, target);
    remove();
    let [absent, whole] = [0, 0];
    for (let i = 0; i < soak(20); i++) {
      const running = start(["restore", destination, target]);
      await Bun.sleep(random() * takes * 1.1);
      running.child.kill("SIGKILL");
      await running.finished;
      // What was started goes on for a while.
      await waitFor(
        "its children to end",
        () =>
          sh(
            `pgrep -f "$1" || :`,
            `btrfs-backup[:].*(${a.path}|${b.path})|^btrfs (send|receive) `,
          ) === "",
      );
      if (existsSync(target)) {
        whole++;
        expectRestored(target, name, states.get(name));
      } else {
        absent++;
        const left = readdirSync(a.path).filter((entry) => entry.includes(".restoring-"));
        const { stderr } = await expectRun(0, ["restore", destination, target]);
        for (const one of left)
          expect(stderr).toContain(`interrupted restore left: ${join(a.path, one)}`);
        expectRestored(target, name, states.get(name));
      }
      expectNoDuplicates(a.path);
      remove();
    }
    console.log(`${absent} times not there, ${whole} times complete`);
  }, 300_000);

  test("kill -9 while the snapshots move: all are where TARGET is, old or new", async () => {
    const { source, snapshots, destination, a, b } = pair();
    await history(4, [source, destination], source);
    const all = snapshotNames(snapshots);
    for (let i = 0; i < soak(8); i++) {
      if (i > 0) await nextSecond();
      const running = start(["restore", "--replace", source, source]);
      sh(
        `while kill -0 "$1" 2>/dev/null; do if pgrep -f "btrfs-backup[:]finish.*$2" >/dev/null; then sleep 0.00$3; kill -9 "$1"; break; fi; done`,
        String(running.pid),
        a.path,
        String(i % 8),
      );
      await running.finished;
      await waitFor(
        "its children to end",
        () => sh(`pgrep -f "$1" || :`, `btrfs-backup[:].*(${a.path}|${b.path})`) === "",
      );
      expect(snapshotNames(snapshots)).toEqual(all);
      expect([...subvolumes(snapshots).values()].every(({ readonly }) => readonly)).toBe(true);
    }
    await nextSecond();
    expect(transfers(await expectRun(0, ["--json", source, destination]))).toMatchObject([
      { parent: all.at(-1) },
    ]);
  }, 120_000);

  test("Ctrl-C leaves nothing behind", async () => {
    const { source, destination, a } = pair();
    sh(`head -c 100M /dev/urandom >"$1/large"`, source);
    await expectRun(0, [source, destination]);
    const running = start(["restore", destination, join(a.path, "new")]);
    await waitFor("the transfer", () => sh(`pgrep -f "$1" || :`, `^btrfs [r]eceive `) !== "");
    running.child.kill("SIGINT");
    expect((await running.finished).status).toBe(130);
    expect(readdirSync(a.path)).toEqual(["home"]);
  });

  test("no space: the error says so, and nothing is left", async () => {
    const { source, destination } = pair();
    sh(`head -c 200M /dev/urandom >"$1/large"`, source);
    await expectRun(0, [source, destination]);
    const small = filesystem({ size: "150M", mkfs: ["-m", "single"] });
    expect(
      (await expectRun(1, ["restore", destination, join(small.path, "new")])).stderr,
    ).toContain("No space left on device");
    expect(readdirSync(small.path)).toEqual([]);
  });

  test("a busy source or backup folder is exit 3, and a leftover that is still at work is not touched", async () => {
    const { source, snapshots, destination, a } = pair();
    await expectRun(0, [source, destination]);
    for (const folder of [destination, snapshots]) {
      const release = await holdLock(`${folder}/.btrfs-backup..lock`);
      expect((await expectRun(3, ["restore", folder, join(a.path, "new")])).stderr).toContain(
        "another run holds",
      );
      await release();
    }
    const left = join(a.path, "new.restoring-20260101-000000");
    mkdirSync(left);
    writeFileSync(join(left, ".btrfs-backup.restoring"), "");
    subvolume(join(left, "tree"));
    const release = await holdLock(left);
    expect((await expectRun(3, ["restore", destination, join(a.path, "new")])).stderr).toContain(
      "another restore is at work",
    );
    expect(existsSync(join(left, "tree"))).toBe(true);
    await release();
    // Not ours: another name, or something else in it.
    mkdirSync(join(a.path, "new.restoring-photos"));
    const foreign = join(a.path, "new.restoring-20200101-000000");
    mkdirSync(foreign);
    subvolume(join(foreign, "tree"));
    subvolume(join(left, "own"));
    writeFileSync(join(left, "mine"), "x");
    expect((await run(["restore", destination, join(a.path, "new")])).stderr).toContain(
      "Directory not empty",
    );
    expect(readFileSync(join(left, "mine"), "utf8")).toBe("x");
    expect(existsSync(join(left, "own"))).toBe(true);
    sh(`rm "$1/mine"; btrfs -q subvolume delete "$1/own" >/dev/null`, left);
    await expectRun(0, ["restore", destination, join(a.path, "new")]);
    expect(
      readdirSync(a.path)
        .filter((entry) => entry.includes("restoring"))
        .toSorted(),
    ).toEqual([basename(foreign), "new.restoring-photos"]);
    expect(existsSync(join(foreign, "tree"))).toBe(true);
  });

  test("the disk of TARGET is mounted anew: it is another place, and nothing is written there", async () => {
    const { source, destination } = pair();
    await expectRun(0, [source, destination]);
    const target = filesystem();
    sh(`umount "$1"`, target.path);
    const { stderr } = await expectRun(1, ["restore", destination, join(target.path, "new")]);
    expect(stderr).toContain("not on btrfs");
    mountImage(target);
  });
});

/** What the echo of dash expands. */
const ODD = "a\\nb\\tc\\cd\\\\e\\0101";
test("paths and prefixes with what echo expands are themselves, here and over ssh", async () => {
  const { source, snapshots, b } = pair();
  const { options, url, user } = await sshServer();
  user("dash", "/bin/dash");
  for (const n of [1, 2, 3]) snapshotAs(source, `${ODD}2026010${n}-000000`);
  for (const place of [
    join(b.path, ODD),
    url(join(b.path, `${ODD}2`), "dash"),
    `raw+${url(join(b.path, `${ODD}raw`), "dash")}`,
  ]) {
    await expectRun(0, ["-S", "--resume", ...options, "-p", ODD, source, place]);
    await expectRun(0, [
      "verify",
      ...options,
      "-p",
      ODD,
      ...(place.startsWith("raw") ? [] : [source]),
      place,
    ]);
    const target = `${join(filesystem().path, ODD)}`;
    await expectRun(0, [
      "restore",
      ...options,
      "-p",
      ODD,
      place,
      place.startsWith("ssh") ? url(target, "dash") : target,
    ]);
    await expectRun(0, ["versions", ...options, "-p", ODD, join(target, "plain/1")]);
    await expectRun(0, ["prune", ...options, "-n", "1", "-p", ODD, place]);
    await nextSecond();
  }
  expect(snapshotNames(join(b.path, ODD), ODD)).toEqual([`${ODD}20260103-000000`]);
  expectSound(join(b.path, ODD), snapshots, ODD);
  expect(
    readdirSync(join(b.path, `${ODD}raw`)).filter((name) => name.endsWith(".btrfs")).length,
  ).toBe(3); // each builds on the one before
}, 120_000);
