// Snapshots that others took: real snapper and real btrbk make them, a run takes them over, and goes on from what btrbk
// has sent. And when a run takes none: nothing has changed, or no destination can be reached.

import { expect, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { basename, join, relative } from "node:path";
import { permitted } from "../btrfs-backup.ts";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSameTree,
  expectSound,
  fill,
  nextSecond,
  pair,
  pathWith,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
  transfers,
} from "./support/rig.ts";
import { generator } from "./support/random.ts";
import { fsidOf, sent as sentOver } from "./support/wire.ts";

/** A snapper of its own for a subvolume, which keeps its configuration out of this machine's. */
function snapperOf(source: string) {
  const own = temporaryDirectory();
  mkdirSync(join(own, "configs"));
  writeFileSync(join(own, "default"), 'SNAPPER_CONFIGS=""\n');
  const call = (...words: string[]) =>
    sh(
      `unshare --mount --propagation private sh -ec 'mount --bind "$1" /etc/snapper; mount --bind "$1/default" /etc/default/snapper; shift; exec snapper --no-dbus -c home "$@"' sh "$@"`,
      own,
      ...words,
    );
  call("create-config", source);
  return {
    create: (words: string) => call("create", "-d", words),
    delete: (...numbers: number[]) => call("delete", ...numbers.map(String)),
    snapshot: (n: number) => join(source, ".snapshots", String(n), "snapshot"),
    /** All that snapper has. */
    state: () =>
      sh(
        `cd "$1/.snapshots"; for i in */snapshot; do btrfs subvolume show $i | grep -v "Generation\\|Snapshot(s)\\|snapshot/\\|Quota"; btrfs property get -ts $i ro; done; cat */info.xml`,
        source,
      ),
  };
}

/** A btrbk of its own, for some subvolumes of a filesystem. */
function btrbkOf(top: string, target: string, names: readonly string[], format = "long-iso") {
  const config = join(temporaryDirectory(), "btrbk.conf");
  const folder = join(top, "btrbk_snapshots");
  mkdirSync(folder);
  mkdirSync(target, { recursive: true });
  const write = (timestamps: string) =>
    writeFileSync(
      config,
      `timestamp_format ${timestamps}\nlockfile ${config}.lock\nvolume ${top}\n snapshot_dir btrbk_snapshots\n target ${target}\n${names.map((name) => `  subvolume ${name}\n`).join("")}`,
    );
  write(format);
  return {
    folder,
    write,
    run: (command = "run") => sh(`btrbk -q -c "$1" "$2"`, config, command),
  };
}

/** The snapshots of a folder, in the order of their IDs. */
const inOrder = (folder: string) =>
  [...subvolumes(folder)]
    .filter(([name]) => /^\d{8}-\d{6}$/.test(name))
    .sort(([, a], [, b]) => a.id - b.id);
const sent = (result: Parameters<typeof transfers>[0]) =>
  transfers(result).map(({ name, parent }) => [name, parent]);

test("snapshots of snapper are taken over: all, then what is new, and what snapper deletes does no harm", async () => {
  const { source, snapshots, destination } = pair();
  const snapper = snapperOf(source);
  const random = generator(24);
  for (const words of ["first", "before <the> & upgrade", "third"]) {
    change(source, random);
    snapper.create(words);
  }
  sh(`btrfs property set -ts "$1" ro false`, snapper.snapshot(3));
  const before = snapper.state();
  const hooks = join(temporaryDirectory(), "log");
  const args = ["--json", "--import", ".snapshots", "-N", "3", "-n", "0", source, destination];
  const hook = (word: string) => `echo ${word} $(ls ${snapshots} 2>/dev/null | wc -l) >>${hooks}`;

  const rehearsed = await expectRun(0, ["--dry-run", ...args]);
  expect(rehearsed.stderr).toMatch(/Would take over 1\/snapshot of .*\.snapshots as \d{8}-\d{6}/);
  expect(rehearsed.stderr).toMatch(/Would send \S+ to .* \(difference to \d{8}-\d{6}\)/);
  expect((await expectRun(0, ["check", "--import", ".snapshots", source])).stdout).toMatch(
    /import .*2 snapshots to take over/,
  );
  expect(existsSync(snapshots) && snapshotNames(snapshots).length > 0).toBe(false);

  const env = { TZ: "Asia/Kolkata" };
  const first = await expectRun(
    0,
    ["--before-snapshot", hook("before"), "--after-snapshot", hook("after"), ...args],
    { env },
  );
  expect(sh(`cat "$1"`, hooks)).toBe("before 0\nafter 2");
  expect(snapper.state()).toBe(before);
  const taken = inOrder(snapshots);
  expect(taken.map(([, { parentUuid, readonly }]) => [parentUuid, readonly])).toEqual(
    [1, 2].map((n) => [
      sh(`btrfs subvolume show "$1" | sed -n 's/^\\s*UUID:\\s*//p'`, snapper.snapshot(n)),
      true,
    ]),
  );
  // The name is the local time of the date, and a second later where that is taken.
  const dated = sh(
    `TZ=Asia/Kolkata date -d "$(sed -n 's/.*<date>\\(.*\\)<.*/\\1 UTC/p' "$1")" +%Y%m%d-%H%M%S`,
    join(source, ".snapshots/1/info.xml"),
  );
  expect(taken.map(([name]) => name)).toEqual([dated, expect.anything()]);
  expect(dated < (taken[1]?.[0] ?? "")).toBe(true);
  expect(events(first).filter(({ event }) => event === "snapshot")).toEqual(
    taken.map(([name], i) => ({
      event: "snapshot",
      name,
      path: join(snapshots, name),
      from: snapper.snapshot(i + 1),
    })),
  );
  expect(first.stderr).toMatch(/1 snapshot in .* is not taken over, being writable.*: 3\/snapshot/);
  expect(events(first).filter(({ event }) => event === "warning")).toEqual([]);
  for (const [i, [name]] of taken.entries())
    expectSameTree(snapper.snapshot(i + 1), join(destination, name));

  // Nothing new, and nothing twice; what is owed is sent.
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(destination, taken[1]?.[0] ?? ""));
  const second = await expectRun(0, ["--backfill", ...args], { env });
  expect(inOrder(snapshots)).toEqual(taken);
  expect(sent(second)).toEqual([[taken[1]?.[0], taken[0]?.[0]]]);

  // All that the next ones come from is gone, and snapper begins to count anew. They are differences all the same.
  snapper.delete(1, 2, 3);
  change(source, random);
  snapper.create("fourth");
  const third = await expectRun(0, ["-v", "debug", ...args], { env });
  const all = inOrder(snapshots).map(([name]) => name);
  expect(sent(third)).toEqual([[all[2], all[1]]]);
  expectSameTree(snapper.snapshot(1), join(destination, all[2] ?? ""));
  snapper.delete(1);
  // So is one of the program's own.
  change(source, random);
  const own = await expectRun(0, ["--json", "-N", "3", source, destination], { env });
  expect(sent(own)[0]?.[1]).toBe(all[2]);
  expectSound(destination, snapshots);

  const listed = (await expectRun(0, ["list", "--json", source, destination])).stdout;
  expect(listed).toContain('"description":"before <the> & upgrade"');
  expect((await expectRun(0, ["list", source])).stdout).toMatch(
    /DESCRIPTION[^]*before <the> & upgrade *\n[^]*fourth/,
  );
});

test("after a rollback the backups go on, if the snapshot folder is outside of what was rolled back", async () => {
  const { a, source, destination } = pair();
  const others = join(a.path, "others");
  const own = join(others, "btrfs-backup");
  const random = generator(26);
  /** As snapper takes one. */
  const take = (n: number) => {
    mkdirSync(join(others, String(n)), { recursive: true });
    writeFileSync(
      join(others, String(n), "info.xml"),
      `<snapshot><type>single</type><num>${n}</num><date>2026-01-0${n} 03:00:00</date></snapshot>\n`,
    );
    sh(`btrfs -q subvolume snapshot -r "$1" "$2" >/dev/null`, source, `${others}/${n}/snapshot`);
  };
  const args = ["--json", "--import", others, "-f", own, source, destination];
  take(1);
  change(source, random);
  take(2);
  await expectRun(0, args);
  change(source, random);
  take(3);
  // What snapper and Timeshift do: SOURCE is another subvolume now, made from an earlier snapshot.
  sh(
    `mv "$1" "$1.old"; btrfs -q subvolume snapshot "$2" "$1" >/dev/null`,
    source,
    `${others}/1/snapshot`,
  );
  change(source, random);
  take(4);
  const [first, second] = inOrder(own).map(([name]) => name);
  const result = await expectRun(0, args);
  const [, , third, fourth] = inOrder(own).map(([name]) => name);
  expect(sent(result)).toEqual([
    [third, second],
    [fourth, first],
  ]);
  expectSameTree(source, join(destination, fourth ?? ""));
  expectSound(destination, own);
});

test("what takes the place of a snapshot after it was looked at is not taken over", async () => {
  const { source, snapshots } = pair();
  snapperOf(source).create("one");
  subvolume(join(source, ".snapshots/other"));
  // The last that is asked of the directory; then something else has the name.
  const bin = temporaryDirectory();
  writeFileSync(
    join(bin, "btrfs"),
    `#!/bin/bash\n${sh("command -v btrfs")} "$@" || exit\n[ "$2 $4" = "list -r" ] && [ -d ./other ] && [ -d ./1 ] || exit 0\nmv ./1/snapshot ./1/aside && mv ./other ./1/snapshot\n`,
    { mode: 0o755 },
  );
  const args = ["--import", ".snapshots", "-T", source];
  const { stderr } = await run(args, { env: pathWith(bin) });
  expect(stderr).toContain("1/snapshot was deleted meanwhile");
  expect([existsSync(join(source, ".snapshots/1/aside")), snapshotNames(snapshots)]).toEqual([
    true,
    [],
  ]);
});

test("what is older than the newest snapshot is skipped, and a directory with nothing of SOURCE is an error", async () => {
  const { source, snapshots, destination, a } = pair();
  const timeshift = join(a.path, "timeshift/snapshots");
  const taken = (name: string, of = source) => {
    mkdirSync(join(timeshift, name), { recursive: true });
    sh(`btrfs -q subvolume snapshot -r "$1" "$2" >/dev/null`, of, join(timeshift, name, "@"));
  };
  // Nobody waits for a FIFO to be read.
  sh(`mkdir -p "$1/9"; mkfifo "$1/9/info.xml"`, timeshift);
  const args = ["--import", timeshift, source, destination];
  const nothing = await expectRun(1, args);
  expect(nothing.stderr).toMatch(/looked for snapper's N\/snapshot.*Timeshift's.*btrbk's/);
  expect((await expectRun(1, ["--import", "no/where", source])).stderr).toMatch(/no\/where/);
  const other = subvolume(join(a.path, "other"));
  taken("2026-01-02_00-00-00", other);
  expect((await expectRun(1, args)).stderr).toMatch(
    /1 are of other subvolumes|no read-only snapshot/,
  );

  mkdirSync(snapshots, { recursive: true });
  snapshotAs(source, "20260103-120000");
  taken("2026-01-03_11-59-59");
  taken("2026-01-03_12-00-01");
  const result = await expectRun(0, ["--json", ...args]);
  expect(snapshotNames(snapshots)).toEqual(["20260103-120000", "20260103-120001"]);
  expect(snapshotNames(destination)).toEqual(["20260103-120000", "20260103-120001"]);
  expect(result.stderr).toMatch(/1 snapshot in .* older than the newest.*2026-01-03_11-59-59\/@/);
  expect(result.stderr).toMatch(/1 snapshot in .* no snapshots of .*2026-01-02_00-00-00\/@/);
  // The next run takes none of them, and succeeds. The directory can be on another mount.
  const mount = temporaryDirectory();
  sh(`mount --bind "$1/timeshift" "$2"`, a.path, mount);
  await expectRun(0, args);
  expect(snapshotNames(snapshots).length).toBe(2);
  taken("2026-01-04_00-00-00");
  await expectRun(0, ["--import", join(mount, "snapshots"), source, destination]);
  expect(snapshotNames(destination)).toEqual([...snapshotNames(snapshots)]);
  expect(snapshotNames(snapshots).at(-1)).toBe("20260104-000000");
  sh(`umount "$1"`, mount);

  // In a folder elsewhere, they are known as SOURCE's own without a record, too.
  const elsewhere = ["--import", timeshift, "-f", join(a.path, "own"), source];
  for (let i = 0; i < 2; i++) {
    await expectRun(0, elsewhere);
    expect(snapshotNames(join(a.path, "own")).length).toBe(3);
    sh(`rm -f "$1/.btrfs-backup.json"`, join(a.path, "own"));
  }

  for (const [line, message] of [
    [["-S", "--import", "x", source], /contradict/],
    [["--if-changed", "--import", "x", source], /contradict/],
    [["-S", "--if-changed", source], /contradict/],
    [["--if-reachable", source], /DEST/],
  ] as const)
    expect((await expectRun(2, line)).stderr).toMatch(message);
});

test("btrbk's snapshots are taken over, and its backups are built on: no full transfer", async () => {
  const { source, snapshots, destination, a } = pair();
  const other = subvolume(join(a.path, "other"));
  fill(other, 2);
  sh(`head -c 20M /dev/urandom >"$1/large"`, source);
  const btrbk = btrbkOf(a.path, destination, ["home", "other"], "short");
  const random = generator(7);
  btrbk.run();
  change(source, random);
  btrbk.run();
  // Two of one day, and two of one minute.
  btrbk.write("long");
  btrbk.run("snapshot");
  btrbk.run("snapshot");
  btrbk.write("long-iso");
  await nextSecond();
  change(source, random);
  btrbk.run("snapshot");
  const foreign = [...subvolumes(btrbk.folder)].filter(([name]) => name.startsWith("home."));
  const theirs = subvolumes(destination);
  const first = await expectRun(0, ["--json", "--import", btrbk.folder, source, destination]);
  const taken = inOrder(snapshots);
  expect(taken.length).toBe(foreign.length);
  expect(new Set(taken.map(([, { parentUuid }]) => parentUuid))).toEqual(
    new Set(foreign.map(([, { uuid }]) => uuid)),
  );
  expect(taken.map(([name]) => name)).toEqual(taken.map(([name]) => name).sort());
  const flow = transfers(first);
  expect(flow.map(({ parent }) => parent)).not.toContain(null);
  expect(flow.reduce((sum, { bytes }) => sum + bytes, 0)).toBeLessThan(10e6);
  expect(flow.map(({ parent }) => String(parent)).some((one) => one.includes("home."))).toBe(true);
  expectSound(destination, snapshots);
  // What btrbk has made stays as it is.
  for (const [name, standing] of theirs)
    expect(subvolumes(destination).get(name)).toEqual(standing);
  // What is gone between import and transfer cannot be a parent, and nothing fails.
  const later = join(destination, "../later");
  sh(
    `mkdir "$2"; btrfs send -q "$1" | btrfs receive -q "$2"`,
    join(btrbk.folder, foreign[0]?.[0] ?? ""),
    later,
  );
  const deletes = `btrfs -q subvolume delete '${btrbk.folder}'/home.*`;
  const args = ["--json", "--import", btrbk.folder, source];
  const gone = await expectRun(0, ["--after-snapshot", deletes, ...args, later]);
  expect(sent(gone).map(([, parent]) => parent)).toEqual([
    null,
    ...taken.slice(0, -1).map(([name]) => name),
  ]);
  expectSound(later, snapshots);
  // btrbk goes on, and its folder loses all that was there.
  await nextSecond();
  change(source, random);
  btrbk.run("snapshot");
  const second = await expectRun(0, ["--json", "--import", btrbk.folder, source, destination]);
  expect(sent(second)).toEqual([[expect.anything(), taken.at(-1)?.[0]]]);
  expectSound(destination, snapshots);
});

test("over ssh, a guarded key takes over what is in its paths, and nothing else", async () => {
  const { source, snapshots, destination, a } = pair();
  const { url, guarded } = await sshServer();
  const btrbk = btrbkOf(a.path, destination, ["home"]);
  btrbk.run();
  await nextSecond();
  change(source, generator(3));
  btrbk.run("snapshot");
  const options = guarded("--path", source, "--path", btrbk.folder, "--source");
  const line = (directory: string) => ["--json", "--import", directory, url(source), destination];
  const result = await expectRun(0, [...options, ...line(btrbk.folder)]);
  expect(sent(result).map(([, parent]) => parent)).not.toContain(null);
  expect(snapshotNames(snapshots).length).toBe(2);
  expectSound(destination, snapshots);
  // A key for SOURCE alone, a link that leads out of its paths, and a snapshot elsewhere.
  const narrow = guarded("--path", source, "--source");
  expect((await expectRun(1, [...narrow, ...line(btrbk.folder)])).stderr).toContain("is not below");
  sh(`ln -s "$1" "$2/link"`, btrbk.folder, source);
  expect((await expectRun(1, [...narrow, ...line(join(source, "link"))])).stderr).toContain(
    "is not below",
  );
  expect(snapshotNames(snapshots).length).toBe(2);

  // What the key itself may ask for, whatever a run would.
  const fsid = fsidOf(snapshots);
  const name = snapshotNames(snapshots)[0] ?? "";
  const theirs = [...subvolumes(btrbk.folder).keys()][0] ?? "";
  const beyond = relative(snapshots, join(btrbk.folder, theirs));
  symlinkSync(btrbk.folder, join(snapshots, "link"));
  const asked = (paths: readonly string[], [verb = "", ...words]: readonly string[]) =>
    permitted(sentOver(verb, ...words), {
      paths: [...paths],
      source: true,
      allowRead: false,
      allowDelete: false,
      maxBytes: null,
    }).then(
      () => "permitted",
      (error: Error) => error.constructor.name,
    );
  const heads = (path: string) => ["heads", snapshots, fsid, path] as const;
  const taking = (path: string) => ["snapshot", path, snapshots, fsid, "20260101-000000"] as const;
  const sending = (parent: string) => {
    const uuid = "0".repeat(32);
    const words = ["-q", snapshots, fsid, "", "", "", name, parent, "", "", uuid, uuid];
    return ["send", ...words] as const;
  };
  for (const [paths, expected] of [
    [[source], "Refused"],
    [[source, btrbk.folder], "permitted"],
  ] as const)
    for (const words of [
      heads(`./${beyond}`),
      taking(join(btrbk.folder, theirs)),
      sending(beyond),
      ["rewritten", snapshots, fsid, name, beyond] as const,
      ["foreign", crypto.randomUUID(), btrbk.folder] as const,
    ])
      expect([words, await asked(paths, words)]).toEqual([words, expected]);
  for (const words of [
    heads(`./link/${theirs}`),
    heads(`./x/../${beyond}`),
    heads(beyond),
    taking(join(snapshots, "link", theirs)),
    taking(join(snapshots, name)),
    taking(`${join(btrbk.folder, theirs)}/.`),
    sending(`link/${theirs}`),
    sending(`../${basename(source)}/../${beyond}`),
    sending("../snapshot"),
    ["delete", "", "", snapshots, fsid, "/", "1", `./${beyond}`] as const,
  ])
    expect([words, await asked([source, btrbk.folder], words)]).toEqual([words, "Refused"]);
});

test("--if-changed: a snapshot only where btrfs finds a difference; what is owed is sent all the same", async () => {
  const { source, snapshots, destination } = pair();
  const metrics = join(temporaryDirectory(), "metrics");
  const args = ["--json", "--if-changed", "--metrics", metrics, source, destination];
  const dates = () => snapshotNames(snapshots);
  await expectRun(0, args);
  const [first = ""] = dates();
  const isQuiet = async (...more: string[]) => {
    await nextSecond();
    const result = await expectRun(0, [...more, ...args]);
    expect(dates()).toEqual([first]);
    expect(result.stderr).toContain(`Nothing has changed since ${first}`);
    expect(events(result)).toContainEqual({ event: "unchanged", since: first });
    return result;
  };
  // Each run has written its record in the snapshot folder, below SOURCE.
  expect(transfers(await isQuiet())).toEqual([]);
  // btrfs has written, and nothing is another: its generation tells nothing.
  sh(`touch "$1/new"; sync -f "$1"; rm "$1/new"; touch -d @1 "$1"; sync -f "$1"`, source);
  await nextSecond();
  await expectRun(0, args);
  const [, second = ""] = dates();
  expect(second).not.toBe(""); // the directory has another time
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(snapshots, first));
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(destination, second));
  await nextSecond();
  const owed = await expectRun(0, args);
  expect(dates()).toEqual([second]);
  expect(sent(owed)).toEqual([[second, null]]);
  expect(sh(`grep '^btrfs_backup_last' "$1" || cat "$1"`, metrics)).toContain(destination);
  expect((await expectRun(0, ["--dry-run", ...args])).stderr).toMatch(
    /if something has changed since/,
  );

  // A change of one byte; a file of ours alone is none, one beside it is.
  writeFileSync(join(snapshots, "note"), "x");
  await nextSecond();
  expect(sent(await expectRun(0, args))).toEqual([[expect.anything(), second]]);
  // A large difference is not read to its end.
  sh(`mkdir "$1/many"; cd "$1/many"; seq 3000 | xargs touch`, source);
  await nextSecond();
  await expectRun(0, args);
  expect(dates().length).toBe(3);
  // The newest one was edited.
  const newest = join(snapshots, dates().at(-1) ?? "");
  sh(
    `btrfs property set -ts "$1" ro false; echo x >"$1/edited"; btrfs property set -ts "$1" ro true`,
    newest,
  );
  await nextSecond();
  await expectRun(0, args);
  expect(dates().length).toBe(4);
});

test("--if-changed with a snapshot folder elsewhere, and through a guarded key", async () => {
  const { source, snapshots, destination, a, b } = pair();
  const folder = join(a.path, "folder");
  const twice = async (expected: string[], ...args: string[]) => {
    await expectRun(0, args);
    await nextSecond();
    await expectRun(0, args);
    expect(expected.map((path) => snapshotNames(path).length)).toEqual(expected.map(() => 1));
  };
  await twice([folder], "--if-changed", "-f", folder, source);
  const { url, guarded } = await sshServer();
  const options = guarded("--path", source, "--source");
  await twice([snapshots, destination], ...options, "--if-changed", url(source), destination);
  // The key cannot delete a newest snapshot that is worth one.
  writeFileSync(join(source, "file"), "new");
  await nextSecond();
  await expectRun(0, [...options, "--if-changed", url(source), destination]);
  expect(snapshotNames(snapshots).length).toBe(2);
  // The guards of older releases refuse a record that says so: no failure, and all else is told.
  const older = subvolume(join(a.path, "older"));
  const [pulled, pushed] = [guarded("--path", older, "--source"), guarded("--path", b.path)];
  const keys = join(options[1]?.split("=")[1] ?? "", "../guarded");
  sh(
    `sed -i 's/command="/&case $SSH_ORIGINAL_COMMAND in *unchanged*) exit 77;; esac; /' "$1"`,
    keys,
  );
  const far = join(destination, "../far");
  await twice([far], ...pulled, "--if-changed", url(older), far);
  const record = readFileSync(join(older, "snapshot/.btrfs-backup.json"), "utf8");
  expect(record).toContain(far);
  expect(record).not.toContain("unchanged");
  const near = join(destination, "../near");
  writeFileSync(join(older, "file"), "new");
  await twice([near], ...pushed, "--newest-only", "--if-changed", older, url(near));
});

test("--if-reachable: no snapshot where no destination can be opened; one that was served before is no failure", async () => {
  const { source, snapshots, destination, b } = pair();
  const dates = () => snapshotNames(snapshots);
  const args = ["--json", "--if-reachable", source];
  const place = join(b.path, "place");
  mkdirSync(place);
  const home = join(place, "home");
  await expectRun(0, [...args, home]);
  expect(dates().length).toBe(1);
  renameSync(place, `${place}.away`);
  await nextSecond();
  const away = await expectRun(0, ["-q", ...args, home]);
  expect([away.stderr, dates().length]).toEqual(["", 1]);
  expect(events(away)).toContainEqual({
    event: "skipped",
    destination: home,
    message: expect.anything(),
  });
  const told = await expectRun(0, [...args, home]);
  expect(told.stderr).toMatch(/No snapshot of .* is taken: no destination can be opened/);
  // Away for too long; never there; one that can be opened.
  sh(`sed -i 's/"last":"[0-9]*/"last":"2020/' "$1/.btrfs-backup.json"`, snapshots);
  await expectRun(1, ["--max-age", "7d", ...args, home]);
  expect((await run([...args, "/not/here/home"])).status).toBe(1);
  expect(dates().length).toBe(1);
  await expectRun(1, [...args, home, destination]);
  expect(dates().length).toBe(2);
  expect(snapshotNames(destination).length).toBe(2);
  expect(contentsDigest(join(destination, dates()[1] ?? ""))).toBe(contentsDigest(source));
});
