// Stored streams: a folder on any filesystem, one over ssh, a bucket. Whatever is listed as whole
// comes back exactly, from the names alone, and nothing half is ever taken for whole.

import { describe, expect, test } from "bun:test";
import {
  existsSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { commandFor, VERBS, type Verb } from "../btrfs-backup.ts";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSameTree,
  filesystem,
  fill,
  gpgKey,
  loginShells,
  nextSecond,
  type Options,
  pair,
  pathWithout,
  reformat,
  run,
  s3Remote,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  temporaryDirectory,
  transfers,
  waitFor,
  logged,
} from "./support/rig.ts";
import { generator, seeded, soak } from "./support/random.ts";
import { killAll } from "./support/processes.ts";

/** Removes a restored subvolume, and the snapshot in it. */
const discard = (target: string) =>
  sh(`btrfs -q subvolume delete "$1"/snapshot/2* "$1" >/dev/null`, target);
/** The files of a folder that are not ours to keep there. */
const filesIn = (folder: string) =>
  readdirSync(folder).filter((name) => !name.startsWith(".btrfs-backup"));
const streamsIn = (folder: string) => filesIn(folder).filter((name) => !name.endsWith(".sha256"));

/** What `list` says of a store: the state of each snapshot. */
async function listed(
  location: string,
  options: Options = {},
  args: readonly string[] = [],
): Promise<Map<string, string>> {
  const [list] = events(await expectRun(0, ["list", "--json", ...args, location], options));
  return new Map(
    list?.["snapshots"]
      .map(({ name, at }: { name: string; at: { state: string }[] }) => [name, at[0]?.state])
      .reverse(),
  );
}

/** Restores a snapshot and compares it. */
async function expectRestores(
  location: string,
  target: string,
  name: string,
  state: string | undefined,
  options: Options = {},
  args: readonly string[] = [],
): Promise<void> {
  await expectRun(0, ["restore", "-q", ...args, "--snapshot", name, location, target], options);
  expect({ name, state: contentsDigest(target) }).toEqual({ name, state: state as string });
  expect(snapshotNames(join(target, "snapshot"))).toEqual([name]); // none of the pieces is left
  expect(readdirSync(dirname(target)).filter((entry) => entry.includes(".restoring-"))).toEqual([]);
  discard(target);
}

test("ten random changes to every kind of store, with each filter, in one run each; then, without a source, all that is left comes back", async () => {
  const { source, a } = pair();
  const ssh = await sshServer();
  const s3 = await s3Remote();
  const gpg = gpgKey();
  const options = { env: { ...s3.env, ...gpg.env } };
  const folder = temporaryDirectory();
  const kinds = [
    (path: string) => `raw://${folder}/${path}`,
    (path: string) => ssh.url(`${folder}/ssh-${path}`).replace(/^ssh:/, "raw+ssh:"),
    s3.url,
  ];
  const filters: Record<string, string[]> = {
    plain: [],
    zst: ["--compress", "zstd:1"],
    gpg: ["--encrypt-to", gpg.recipient],
    both: ["--compress", "zstd", "--encrypt-to", gpg.recipient],
  };
  const stores = kinds.flatMap((url) =>
    Object.entries(filters).map(([path, words]) => ({ id: url(path), words })),
  );
  const args = [
    "--json",
    ...ssh.options,
    "-N",
    "2",
    "-n",
    "6",
    "--full-every",
    "4",
    source,
    ...stores.flatMap(({ id, words }) => ["--for", id, ...words]),
  ];
  const random = seeded();
  const states = new Map<string, string>();
  for (let i = 0; i < 10; i++) {
    if (i > 0) await nextSecond();
    const result = await expectRun(0, args, options);
    const name = events(result).find(({ event }) => event === "snapshot")?.["name"];
    states.set(name, contentsDigest(source));
    expect(
      transfers(result)
        .map(({ destination, name: sent, parent }) => [destination, sent, parent === null])
        .sort(),
    ).toEqual(
      stores
        .map(({ id }) => id)
        .sort()
        .map((id) => [id, name, i % 4 === 0]),
    );
    change(source, random);
  }
  reformat(a); // no source, no snapshot folder, no record
  const kept = [...states.keys()].slice(4);
  const restored =
    soak(2) >= kept.length
      ? kept
      : [kept.at(-1) as string, kept[Math.floor(random() * 5)] as string];
  const suffix = (list: string[]) => [
    ...new Set(list.map((name) => name.replace(/^.*\.btrfs/, ".btrfs"))),
  ];
  expect(Object.keys(filters).map((path) => suffix(streamsIn(join(folder, path))))).toEqual([
    [".btrfs"],
    [".btrfs.zst"],
    [".btrfs.gpg"],
    [".btrfs.zst.gpg"],
  ]);
  for (const { id } of stores) {
    expect([...(await listed(id, options, ssh.options))]).toEqual(
      kept.map((name) => [name, "whole"]),
    );
    // All of them where every filter is in use, and everywhere with SOAK=6 or more.
    for (const name of id.endsWith("both") ? kept : restored)
      await expectRestores(id, join(a.path, "again"), name, states.get(name), options, ssh.options);
    await expectRun(0, ["verify", "-q", ...ssh.options, id], options);
  }
  // Nothing but what is listed is stored, and nobody else can read it.
  expect(filesIn(join(folder, "plain")).length).toBe(12);
  expect(s3.rclone(`rclone lsf "$S/plain" | wc -l`)).toBe("12");
  expect(
    statSync(join(folder, "plain", streamsIn(join(folder, "plain"))[0] as string)).mode & 0o777,
  ).toBe(0o600);
  expect(sh(`cd "$1"; sha256sum -c --quiet ./*.sha256 && echo right`, join(folder, "both"))).toBe(
    "right",
  );
  expect(sh(`cd "$1"; cat 2*.btrfs.gpg | grep -c plain || :`, join(folder, "gpg"))).toBe("0");
});

test("a restored source goes on in the store, incrementally; elsewhere it is refused, until --adopt", async () => {
  const { source, a, b } = pair();
  const store = `raw://${temporaryDirectory()}/s`;
  await expectRun(0, [source, store]);
  await nextSecond();
  change(source, generator(4));
  await expectRun(0, [source, store]);
  const [first = "", newest = ""] = snapshotNames(join(source, "snapshot"));
  reformat(a);
  await expectRun(0, ["restore", store, source]);
  await nextSecond();
  expect(transfers(await expectRun(0, ["--json", source, store]))).toMatchObject([
    { parent: newest },
  ]);
  const elsewhere = join(b.path, "home");
  const said = (await expectRun(0, ["restore", store, elsewhere])).stderr;
  expect(said).toContain("--adopt");
  await nextSecond();
  const refused = await expectRun(1, [elsewhere, store]);
  expect(refused.stderr).toContain("as it was elsewhere");
  expect((await listed(store)).size).toBe(3);
  expect(
    transfers(await expectRun(0, ["--json", "-S", "--adopt", elsewhere, store])),
  ).toMatchObject([{ parent: [...(await listed(store)).keys()][2] }]);
  // What the source was before is still its own: retention counts it.
  await nextSecond();
  await expectRun(0, ["-n", "5", elsewhere, store]);
  expect([...(await listed(store)).keys()]).toEqual(expect.arrayContaining([first]));
  await nextSecond();
  await expectRun(0, ["-n", "1", "--full-every", "1", elsewhere, store]);
  expect((await listed(store)).size).toBe(1);
});

test("what was stored before the source was restored is still its own, also when a new chain stands on nothing of it", async () => {
  const { source, a } = pair();
  const folder = temporaryDirectory();
  const backup = (...args: string[]) =>
    expectRun(0, ["-N", "1", "--full-every", "3", ...args, source, `raw://${folder}`]);
  for (let i = 0; i < 2; i++) {
    await backup();
    await nextSecond();
    reformat(a);
    await expectRun(0, ["restore", `raw://${folder}`, source]);
  }
  for (let i = 0; i < 4; i++) {
    await backup("-n", "2");
    await nextSecond();
  }
  expect(streamsIn(folder).length).toBe(3); // two, and what the older one builds on
  await expectRun(0, ["verify", `raw://${folder}`]);
});

test("another source is refused before anything is written; adopted beside it, its streams are never pruned", async () => {
  const { source, b } = pair();
  const folder = join(temporaryDirectory(), "s");
  await expectRun(0, [source, `raw://${folder}`]);
  const other = subvolume(join(b.path, "other"));
  const before = filesIn(folder);
  expect((await expectRun(1, [other, `raw://${folder}`])).stderr).toContain(
    "belong to another source",
  );
  expect(filesIn(folder)).toEqual(before);
  await nextSecond();
  await expectRun(0, ["--adopt", "-n", "1", other, `raw://${folder}`]);
  await nextSecond();
  await expectRun(0, ["-n", "1", "--full-every", "1", other, `raw://${folder}`]);
  expect(filesIn(folder)).toEqual(expect.arrayContaining(before));
  expect(streamsIn(folder).length).toBe(2);
});

test("one run serves a plain disk and an encrypted bucket, each with options of its own", async () => {
  const { source, snapshots, destination } = pair();
  const s3 = await s3Remote();
  const gpg = gpgKey();
  const options = { env: { ...s3.env, ...gpg.env } };
  const args = [
    "--json",
    "-n",
    "2",
    source,
    destination,
    "--for",
    s3.url("home"),
    "-n",
    "1",
    "--full-every",
    "2",
    "--encrypt-to",
    gpg.recipient,
    "--compress",
    "zstd",
  ];
  for (let i = 0; i < 4; i++) {
    if (i > 0) await nextSecond();
    expect(
      transfers(await expectRun(0, args, options)).map(({ parent }) => parent === null),
    ).toEqual([i === 0, i % 2 === 0]);
  }
  const names = snapshotNames(snapshots);
  expect(snapshotNames(destination)).toEqual(names.slice(2));
  expect([...(await listed(s3.url("home"), options)).keys()]).toEqual(names.slice(2)); // the last one needs its full stream
  expect(
    s3.rclone(`rclone lsf "$S/home" | grep -cv 'btrfs.zst.gpg'`.replace("-cv", "-cv") + " || :"),
  ).toBe("0");
  // -n before --for is for all the others, and for those that say nothing of it.
  const [one, two] = [temporaryDirectory(), temporaryDirectory()];
  await expectRun(0, [
    "-S",
    "-n",
    "3",
    "--full-every",
    "1",
    source,
    `raw://${one}`,
    "--for",
    `raw://${two}`,
    "-n",
    "1",
  ]);
  expect([streamsIn(one).length, streamsIn(two).length]).toEqual([3, 1]);
});

describe("what the command line makes no sense of is refused before anything is done", () => {
  test.each([
    [
      "encryption of what is received on btrfs points to --for",
      ["--encrypt-to", "me", "/s", "/d"],
      /--for DEST/,
    ],
    ["also behind --for", ["/s", "--for", "/d", "--encrypt-to", "me"], /cannot be encrypted: \/d/],
    [
      "--full-every without stored streams",
      ["--full-every", "3", "/s", "/d"],
      /needs a destination of stored streams/,
    ],
    [
      "behind --for, it is that one's",
      ["/s", "raw:///r", "--for", "/d", "--full-every", "3"],
      /needs a destination of stored streams/,
    ],
    [
      "nonsense for --full-every",
      ["--full-every", "often", "/s", "raw:///r"],
      /"often" says not when/,
    ],
    ["a destination twice", ["/s", "--for", "/d", "-n", "1", "--for", "/d", "-n", "2"], /twice/],
    ["a long prefix", ["-p", "p".repeat(71), "/s", "raw:///r"], /at most 70 bytes/],
    [
      "a protocol that does not exist",
      ["--protocol", "3", "/s", "raw:///r"],
      /--protocol is 1 or 2/,
    ],
    ["streams as a source", ["raw:///r", "/d"], /cannot be stored streams/],
    [
      "streams as a restore's target",
      ["restore", "/d", "raw:///r"],
      /TARGET cannot be stored streams/,
    ],
    ["a remote without a name", ["/s", "rclone://path"], /not of the form rclone:\/\/REMOTE:PATH/],
    ["a relative path", ["/s", "raw://path"], /not of the form raw:\/\/\/path/],
    ["versions of what cannot be looked into", ["versions", "/s/f", "shell://c"], /nothing can be/],
    ["nothing to compare with", ["verify", "/s"], /with what/],
    ["one folder beside streams", ["verify", "/s", "raw:///r"], /with what/],
  ] as [string, string[], RegExp][])("%s", async (_, args, said) =>
    expect((await expectRun(2, args)).stderr).toMatch(said),
  );
});

test("what is encrypted once is not stored in the clear because an option was forgotten", async () => {
  const { source } = pair();
  const gpg = gpgKey();
  const folder = temporaryDirectory();
  await expectRun(0, ["--encrypt-to", gpg.recipient, source, `raw://${folder}`], gpg);
  await nextSecond();
  for (const args of [
    [source, `raw://${folder}`],
    ["-S", "--locked-dests", source],
  ])
    expect((await expectRun(1, args, gpg)).stderr).toContain("--encrypt-to is missing");
  expect(streamsIn(folder).length).toBe(1);
  await expectRun(0, ["-S", "--locked-dests", "--encrypt-to", gpg.recipient, source], gpg);
  expect(streamsIn(folder).every((name) => name.endsWith(".btrfs.gpg"))).toBe(true);
  expect(streamsIn(folder).length).toBe(2);
});

test("a filter that fails is a failed transfer, and nothing appears under a final name", async () => {
  const { source, snapshots } = pair();
  const s3 = await s3Remote();
  const gpg = gpgKey();
  const folder = join(temporaryDirectory(), "s");
  const raw = `raw://${folder}`;
  sh(`head -c 20M /dev/urandom >"$1/large"`, source);
  const options = { env: { ...s3.env, ...gpg.env } };
  const failed = await expectRun(
    1,
    ["--encrypt-to", "nobody@example.org", source, raw, s3.url("s")],
    options,
  );
  const told = /--encrypt-to nobody@example.org: gpg knows no key/g;
  expect(logged(failed.stderr).match(told)?.length).toBe(2);
  // zstd that dies, half-way: by a program of its name that comes first.
  const tools = temporaryDirectory();
  writeFileSync(join(tools, "zstd"), "#!/bin/bash\nhead -c 3000000; kill -9 $$\n", { mode: 0o755 });
  await nextSecond();
  const killed = await expectRun(1, ["--compress", "zstd", source, raw, s3.url("s")], {
    env: { ...options.env, PATH: `${tools}:${s3.env["PATH"]}` },
  });
  expect(logged(killed.stderr).match(/btrfs send or zstd was killed/g)?.length).toBe(2);
  expect(filesIn(folder)).toEqual([]);
  expect(s3.rclone(`rclone lsf "$S/s" | wc -l`)).toBe("0");
  expect(existsSync(join(snapshots, ".btrfs-backup.json"))).toBe(false); // nothing is remembered
  // And where it is missing, that is said before anything is sent.
  await nextSecond();
  const missing = await expectRun(1, ["--compress", "zstd", source, raw], {
    env: { PATH: pathWithout("zstd") },
  });
  expect(missing.stderr).toContain("install zstd");
  expect(missing.stderr).not.toContain("Sending");
  expect(
    (await expectRun(1, ["--encrypt-to", "me", source, raw], { env: { PATH: pathWithout("gpg") } }))
      .stderr,
  ).toContain("install gnupg");
  expect(
    (await expectRun(1, [source, "rclone://x:y"], { env: { PATH: pathWithout("rclone") } })).stderr,
  ).toContain("install rclone");
});

test("when btrfs send is killed half-way, or the link, nothing appears, and the next run repairs", async () => {
  const { source } = pair();
  const ssh = await sshServer();
  const s3 = await s3Remote();
  sh(`head -c 60M /dev/urandom >"$1/large"`, source);
  const folder = join(temporaryDirectory(), "s");
  for (const [store, victim] of [
    [`raw://${folder}`, "^btrfs send -q \\./"],
    [ssh.url(folder).replace(/^ssh:/, "raw+ssh:"), "^btrfs send -q \\./"],
    [ssh.url(folder).replace(/^ssh:/, "raw+ssh:"), `^ssh .*btrfs-backup:store`],
    [s3.url("s"), "^btrfs send -q \\./"],
    [s3.url("s"), `^rclone rcat`],
  ] as const) {
    const running = start(
      [...ssh.options, "--rate-limit", "10m", "--newest-only", source, store],
      s3,
    );
    await waitFor("the transfer", () => sh(`pgrep -f "$1" || :`, victim) !== "");
    killAll(new RegExp(victim));
    expect((await running.finished).status).toBe(1);
    expect([...(await listed(store, s3, ssh.options))]).toEqual([]);
    await nextSecond();
  }
  expect(filesIn(folder)).toEqual([]);
  expect(
    transfers(
      await expectRun(
        0,
        ["--json", "-S", "--newest-only", ...ssh.options, source, `raw://${folder}`, s3.url("s")],
        s3,
      ),
    ).length,
  ).toBe(2);
  await expectRun(0, ["verify", `raw://${folder}`]);
  await expectRun(0, ["verify", s3.url("s")], s3);
});

test("kill -9 at random moments of backups and prunes: whatever is listed as whole comes back", async () => {
  const { source, b } = pair();
  const s3 = await s3Remote();
  const folder = join(temporaryDirectory(), "s");
  const random = seeded();
  const states = new Map<string, string>();
  const rounds = soak(5);
  let killed = 0;
  snapshotAs(source, "20251231-000000");
  states.set("20251231-000000", contentsDigest(source));
  await expectRun(0, ["-S", source, `raw://${folder}`, s3.url("s")], s3);
  for (let i = 0; i < rounds; i++) {
    const store = i % 2 === 0 ? `raw://${folder}` : s3.url("s");
    const name = `2026${String(1 + Math.floor(i / 28)).padStart(2, "0")}${String(1 + (i % 28)).padStart(2, "0")}-000000`;
    change(source, random);
    snapshotAs(source, name);
    states.set(name, contentsDigest(source));
    const group = random() < 0.5;
    const running = start(["-S", "-n", "2", "--full-every", "2", source, store], {
      ...s3,
      group: true,
    });
    const ended = running.finished.then(() => true);
    if (
      !(await Promise.race([
        ended,
        Bun.sleep(60 + random() * (i % 2 === 0 ? 350 : 900)).then(() => false),
      ]))
    ) {
      killed++;
      process.kill(group ? -running.pid : running.pid, "SIGKILL");
      await running.finished;
      // Of the program alone: what it began goes on, and ends by itself.
      await waitFor(
        "the orphans",
        () => sh(`pgrep -f '[b]trfs-backup:(rclone|store|commit|drop)' || :`) === "",
      );
    }
    const whole = [...(await listed(store, s3))]
      .filter(([, state]) => state === "whole")
      .map(([name]) => name);
    for (const name of whole.length > 0
      ? [whole.at(-1) as string, whole[Math.floor(random() * whole.length)] as string]
      : [])
      await expectRestores(store, join(b.path, "again"), name, states.get(name), s3);
  }
  console.log(`killed ${killed} of ${rounds}`);
  for (const store of [`raw://${folder}`, s3.url("s")]) {
    await expectRun(0, ["-S", "--wait", "60", "-n", "2", "--full-every", "2", source, store], s3);
    for (const [name, state] of await listed(store, s3)) {
      expect(state).toBe("whole");
      await expectRestores(store, join(b.path, "again"), name, states.get(name), s3);
    }
    await expectRun(0, ["verify", store], s3);
  }
  expect(readdirSync(folder).filter((name) => name.endsWith(".part"))).toEqual([]);
});

describe("a stream that is damaged, cut short, or gone", () => {
  for (const kind of ["raw", "S3"])
    test(`is named by verify and restore, and nothing wrong is left at TARGET (${kind})`, async () => {
      const { source, snapshots, b } = pair();
      const s3 = await s3Remote();
      const folder = temporaryDirectory();
      const store = kind === "raw" ? `raw://${folder}` : s3.url("s");
      for (const day of [1, 2, 3, 4]) {
        change(source, generator(day));
        snapshotAs(source, `2026010${day}-000000`);
      }
      await expectRun(0, ["-S", source, store], s3);
      const target = join(b.path, "again");
      const objects = (
        kind === "raw"
          ? streamsIn(folder)
          : s3.rclone(`rclone lsf "$S/s" --exclude '*.sha256'`).split("\n")
      ).sort();
      const third = objects[2] as string;
      const put = (name: string, file: string) =>
        kind === "raw"
          ? sh(`cp "$1" "$2/$3"`, file, folder, name)
          : s3.rclone(`rclone rcat "$S/s/$2" <"$1"`, file, name);
      const original = join(temporaryDirectory(), "stream");
      if (kind === "raw") sh(`cp "$1/$2" "$3"`, folder, third, original);
      else s3.rclone(`rclone cat "$S/s/$1" >"$2"`, third, original);
      const damages: Record<string, string> = {
        "one byte": `cp "$1" "$2"; s=$(stat -c %s "$2"); o=$((s / 2)); b=$(od -An -tu1 -j $o -N 1 "$2" | tr -d ' '); printf "\\\\$(printf %o $((255 - b)))" | dd of="$2" bs=1 seek=$o conv=notrunc 2>/dev/null`,
        "the last byte, which belongs to a checksum of btrfs": `cp "$1" "$2"; printf '\\0' | dd of="$2" bs=1 seek=$(($(stat -c %s "$2") - 1)) conv=notrunc 2>/dev/null; printf x >>"$2"`,
        "cut short": `head -c -100 "$1" >"$2"`,
        empty: `: >"$2"`,
      };
      for (const [what, script] of Object.entries(damages)) {
        sh(script, original, `${original}.bad`);
        put(third, `${original}.bad`);
        const verified = await expectRun(1, ["verify", "--json", store], s3);
        expect([what, verified.stderr]).toEqual([
          what,
          expect.stringContaining(`${third} is damaged`),
        ]);
        expect(verified.stderr).toContain("not to be restored: 20260103-000000, 20260104-000000");
        expect(
          events(verified)
            .filter(({ event }) => event === "verify")
            .map(({ equal }) => equal),
        ).toEqual([true, true, false, true]);
        const restored = await expectRun(1, ["restore", store, target], s3);
        expect([what, restored.stderr]).toEqual([what, expect.stringContaining(third)]);
        expect(restored.stderr).toContain("--snapshot 20260102-000000");
        expect(readdirSync(b.path)).toEqual([]);
      }
      put(third, original);
      await expectRun(0, ["verify", store], s3);
      // Gone: said before the first byte moves.
      if (kind === "raw") sh(`rm "$1/$2"`, folder, third);
      else s3.rclone(`rclone deletefile "$S/s/$1"`, third);
      expect([...(await listed(store, s3)).values()]).toEqual(["whole", "whole", "incomplete"]);
      const lost = await expectRun(1, ["restore", store, target], s3);
      expect(lost.stderr).toContain(`${objects[3]} builds on`);
      expect(lost.stderr).toContain("--snapshot 20260102-000000");
      expect(lost.stderr).not.toContain("Restoring");
      expect(readdirSync(b.path)).toEqual([]);
      expect((await expectRun(1, ["verify", store], s3)).stderr).toContain("20260104-000000");
      await expectRestores(
        store,
        target,
        "20260102-000000",
        contentsDigest(join(snapshots, "20260102-000000")),
        s3,
      );
      // The next run does not build on what cannot be restored, and says so.
      const repaired = await expectRun(0, ["-S", "--json", source, store], s3);
      expect(repaired.stderr).toContain("cannot be restored");
      expect(transfers(repaired).map(({ name, parent }) => [name, parent])).toEqual([
        ["20260103-000000", "20260102-000000"],
        ["20260104-000000", "20260103-000000"],
      ]);
      expect((await listed(store, s3)).get("20260104-000000")).toBe("whole");
    });
});

test("checksum objects that got lost take no stream with them, and --unverified restores from the names alone", async () => {
  const { source, b } = pair();
  const s3 = await s3Remote();
  const folder = temporaryDirectory();
  for (const day of [1, 2, 3]) {
    change(source, generator(day));
    snapshotAs(source, `2026010${day}-000000`);
  }
  await expectRun(0, ["-S", source, `raw://${folder}`, s3.url("s")], s3);
  sh(`rm "$1"/*.sha256`, folder);
  s3.rclone(`rclone delete "$S/s" --include '*.sha256'`);
  const target = join(b.path, "again");
  expect((await expectRun(1, ["restore", `raw://${folder}`, target])).stderr).toContain(
    "--unverified",
  );
  expect((await expectRun(1, ["restore", s3.url("s"), target], s3)).stderr).toContain(
    "--unverified",
  );
  const state = contentsDigest(join(source, "snapshot/20260103-000000"));
  for (const store of [`raw://${folder}`, s3.url("s")])
    await expectRestores(store, target, "20260103-000000", state, s3, ["--unverified"]);
  expect((await expectRun(1, ["verify", `raw://${folder}`])).stderr).toContain(
    "no checksum object",
  );
  // A run with the strictest policy deletes none of them.
  expect(
    (await expectRun(1, ["-S", "-n", "1", "--full-every", "1", source, s3.url("s")], s3)).stderr,
  ).toContain("no checksum object");
  expect(
    Number(s3.rclone(`rclone lsf "$S/s" --exclude '*.sha256' | wc -l`)),
  ).toBeGreaterThanOrEqual(3);
  // Made again by hand, they are as good as ours.
  s3.rclone(
    `for f in $(rclone lsf "$S/s" --exclude '*.sha256'); do printf '%s  %s\\n' "$(rclone cat "$S/s/$f" | sha256sum | cut -d ' ' -f 1)" "$f" | rclone rcat "$S/s/$f.sha256"; done`,
  );
  await expectRun(0, ["verify", s3.url("s")], s3);
  await expectRestores(s3.url("s"), target, "20260103-000000", state, s3);
});

test("what a killed upload left in a bucket is not whole, and the next run removes it", async () => {
  const { source } = pair();
  const s3 = await s3Remote();
  await expectRun(0, [source, s3.url("s")], s3);
  await nextSecond();
  const result = await expectRun(0, ["--json", source, s3.url("s")], s3);
  const [{ name = "" } = {}] = transfers(result);
  s3.rclone(
    `for f in $(rclone lsf "$S/s" --include "$1*.sha256"); do rclone deletefile "$S/s/$f"; done; echo x | rclone rcat "$S/s/20200101-000000+0000_00000000_00000000_00000000-0000-0000-0000-000000000000_00000000-0000-0000-0000-000000000000_full.btrfs.sha256"`,
    name,
  );
  expect((await listed(s3.url("s"), s3)).get(name)).toBe("incomplete");
  expect(transfers(await expectRun(0, ["--json", "-S", source, s3.url("s")], s3))).toMatchObject([
    { name },
  ]);
  expect([...(await listed(s3.url("s"), s3)).values()]).toEqual(["whole", "whole"]);
  expect(s3.rclone(`rclone lsf "$S/s" | wc -l`)).toBe("4");
});

test("an upload that outlives its run, and the next run, never write side by side", async () => {
  const { source } = pair();
  sh(`head -c 20M /dev/urandom >"$1/large"`, source);
  const s3 = await s3Remote();
  const folder = join(temporaryDirectory(), "s");
  const stored = () =>
    existsSync(folder) && readdirSync(folder).some((name) => name.endsWith(".part"));
  for (const [store, writes] of [
    [`raw://${folder}`, stored],
    [s3.url("s"), () => sh(`pgrep -f "^rclone rcat" || :`) !== ""],
  ] as const) {
    const running = start(["--rate-limit", "8m", source, store], s3);
    await waitFor("the transfer", writes);
    running.child.kill("SIGKILL");
    await running.finished;
    expect([1, 3]).toContain((await run(["-S", source, store], s3)).status as number); // busy
    await expectRun(0, ["-S", "--wait", "60", source, store], s3);
    await expectRun(0, ["verify", store], s3);
    await nextSecond();
  }
  expect(readdirSync(folder).filter((name) => name.endsWith(".part"))).toEqual([]);
});

test("the upload of 512 MiB takes less than 150 MB of memory in any process, and no file on this disk", async () => {
  const { source } = pair({ size: "3G" });
  sh(`head -c 512M /dev/urandom >"$1/large"`, source);
  const s3 = await s3Remote();
  const running = start(["-q", source, s3.url("s")], s3);
  let ended = false;
  const finished = running.finished.finally(() => (ended = true));
  const peaks = new Map<string, number>();
  const written = new Set<string>();
  while (!ended) {
    for (const pid of descendants(running.pid)) {
      try {
        const status = readFileSync(`/proc/${pid}/status`, "utf8");
        const name = /^Name:\s+(\S+)/m.exec(status)?.[1] ?? "";
        peaks.set(
          name,
          Math.max(peaks.get(name) ?? 0, Number(/^VmHWM:\s+(\d+)/m.exec(status)?.[1] ?? 0)),
        );
        for (const fd of readdirSync(`/proc/${pid}/fd`))
          if (
            statSync(`/proc/${pid}/fd/${fd}`).isFile() &&
            statSync(`/proc/${pid}/fd/${fd}`).size > 1 << 20 &&
            /^flags:\s+0*\d*[12]$/m.test(readFileSync(`/proc/${pid}/fdinfo/${fd}`, "utf8"))
          )
            written.add(readlinkSync(`/proc/${pid}/fd/${fd}`));
      } catch {
        continue; // it ended while we looked
      }
    }
    await Bun.sleep(50);
  }
  expect((await finished).status).toBe(0);
  expect([...peaks].filter(([, peak]) => peak > 150_000)).toEqual([]);
  expect(peaks.get("rclone")).toBeGreaterThan(10_000); // it was really seen
  expect([...written]).toEqual([]);
});

/** A process and all that it started. */
function descendants(pid: number): number[] {
  const parents = sh(`ps -e -o pid=,ppid=`)
    .split("\n")
    .map((line) => line.trim().split(/\s+/).map(Number));
  const found = [pid];
  for (const one of found)
    found.push(...parents.filter(([, parent]) => parent === one).map(([child = 0]) => child));
  return found;
}

test("part sizes follow the estimate, a variable of the user's wins, and what S3 cannot hold is refused before it is sent", async () => {
  const { source } = pair();
  const s3 = await s3Remote();
  const tools = temporaryDirectory();
  const [out, real] = [join(tools, "out"), sh("command -v btrfs")];
  writeFileSync(
    join(tools, "rclone"),
    `#!/bin/bash\n[ "$1" != rcat ] || echo "$RCLONE_S3_CHUNK_SIZE $RCLONE_S3_UPLOAD_CONCURRENCY" >>${out}\nexec ${sh("command -v rclone")} "$@"\n`,
    { mode: 0o755 },
  );
  // What an estimate reads, of a stream that nobody has the disks for.
  writeFileSync(
    join(tools, "btrfs"),
    `#!/bin/bash\nif [ "$1 $2" = "receive --dump" ] && [ -n "$LENGTH" ]; then name=$(${real} "$@" | grep -o "[.]/[^/ ]*" | head -n 1); echo "snapshot $name"; echo "update_extent   $name/y   offset=0 len=$LENGTH"; exit; fi\nexec ${real} "$@"\n`,
    { mode: 0o755 },
  );
  const env = { ...s3.env, PATH: `${tools}:${s3.env["PATH"]}` };
  const parts = () => sh(`sed -n 1p "$1"; rm "$1"`, out); // the checksum's comes second
  await expectRun(0, [source, s3.url("s")], { env });
  expect(parts()).toBe("16M 2");
  await nextSecond();
  await expectRun(0, [source, s3.url("s")], { env: { ...env, LENGTH: String(2 ** 40) } });
  expect(parts()).toBe("111M 2");
  await nextSecond();
  await expectRun(0, [source, s3.url("s")], {
    env: {
      ...env,
      LENGTH: String(2 ** 40),
      RCLONE_S3_CHUNK_SIZE: "16M",
      RCLONE_S3_UPLOAD_CONCURRENCY: "1",
    },
  });
  expect(parts()).toBe("16M 1");
  await nextSecond();
  const refused = await expectRun(1, [source, s3.url("s")], {
    env: { ...env, LENGTH: String(6 * 2 ** 40) },
  });
  expect(refused.stderr).toContain("an object of S3 at most 5.0T");
  expect(existsSync(out)).toBe(false);
});

test("the estimate is what is really sent, but for a little", async () => {
  const { source } = pair();
  const s3 = await s3Remote();
  sh(`head -c 30M /dev/urandom >"$1/large"; cp --reflink "$1/large" "$1/copy"`, source);
  const result = await expectRun(0, ["--json", "-v", "debug", source, s3.url("s")], s3);
  const [, estimate = "", unit] = /will have some ([\d.]+)([BKM])/.exec(result.stderr) ?? [];
  expect(unit).toBe("M");
  expect(Math.abs(Number(estimate) * 2 ** 20 - transfers(result)[0]?.["bytes"])).toBeLessThan(
    1 << 20,
  );
});

test("a hundred streams in one chain come back, and --full-every 0 warns of them", async () => {
  const { source, snapshots, b } = pair();
  const folder = temporaryDirectory();
  for (let i = 0; i < 102; i++) {
    sh(`echo "$2" >"$1/plain/counter"`, source, String(i));
    snapshotAs(
      source,
      `20260101-00${String(Math.floor(i / 60)).padStart(2, "0")}${String(i % 60).padStart(2, "0")}`,
    );
  }
  const result = await expectRun(0, ["-q", "-S", "--full-every", "0", source, `raw://${folder}`]);
  expect(result.stderr.match(/takes \d+ streams/g)).toEqual([
    "takes 101 streams",
    "takes 102 streams",
  ]);
  await expectRestores(
    `raw://${folder}`,
    join(b.path, "again"),
    "20260101-000141",
    contentsDigest(join(snapshots, "20260101-000141")),
  );
});

test("in the hour that comes twice, the later snapshot is the newer one, also for those who have only names", async () => {
  const { source, a, b } = pair();
  const folder = temporaryDirectory();
  const env = { TZ: "Europe/Berlin" };
  for (const name of ["20261025-023000", "20261025-021500"]) {
    change(source, generator(Number(name.slice(9))));
    snapshotAs(source, name);
  }
  const state = contentsDigest(source);
  await expectRun(0, ["-S", source, `raw://${folder}`], { env });
  expect(
    streamsIn(folder)
      .sort()
      .map((name) => name.slice(0, 20)),
  ).toEqual(["20261025-021500+0100", "20261025-023000+0200"]);
  reformat(a);
  expect([...(await listed(`raw://${folder}`)).keys()]).toEqual([
    "20261025-023000",
    "20261025-021500",
  ]);
  const target = join(b.path, "again");
  await expectRun(0, ["restore", `raw://${folder}`, target]);
  expect(contentsDigest(target)).toBe(state);
});

test("a re-created snapshot with the same name is never taken for the old one", async () => {
  const { source, snapshots, b } = pair();
  const folder = temporaryDirectory();
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, `raw://${folder}`]);
  sh(
    `btrfs -q subvolume delete "$1/20260101-000000" >/dev/null; rm -rf "$2/plain"`,
    snapshots,
    source,
  );
  snapshotAs(source, "20260101-000000");
  change(subvolumeWith(source), generator(1));
  snapshotAs(source, "20260102-000000");
  const sent = transfers(await expectRun(0, ["--json", "-S", source, `raw://${folder}`]));
  expect(sent.map(({ name, parent }) => [name, parent])).toEqual([
    ["20260101-000000", null],
    ["20260102-000000", "20260101-000000"],
  ]);
  const store = `raw://${folder}`;
  await expectRestores(
    store,
    join(b.path, "again"),
    "20260102-000000",
    contentsDigest(join(snapshots, "20260102-000000")),
  );
  // The name alone does not say which of the two is meant.
  expect(
    (await expectRun(1, ["restore", "--snapshot", "20260101-000000", store, join(b.path, "again")]))
      .stderr,
  ).toContain("several snapshots");
  const again = sh(
    `btrfs subvolume show "$1" | awk '/^\\tUUID/ { print $2 }'`,
    join(snapshots, "20260101-000000"),
  );
  const object = streamsIn(folder).find((name) => name.includes(`_${again}_full`)) as string;
  await expectRun(0, ["restore", "--snapshot", object, store, join(b.path, "again")]);
  expect(contentsDigest(join(b.path, "again"))).toBe(
    contentsDigest(join(snapshots, "20260101-000000")),
  );
});
/** A source whose files were removed, filled anew. */
function subvolumeWith(source: string): string {
  sh(
    `mkdir -p "$1/plain"; for i in 1 2 3; do head -c 9000 /dev/urandom >"$1/plain/$i"; done`,
    source,
  );
  return source;
}

test("a folder that is empty where streams were is not written to, until --adopt: the disk is not mounted", async () => {
  const { source } = pair();
  const s3 = await s3Remote();
  const folder = temporaryDirectory();
  await expectRun(0, [source, `raw://${folder}`, s3.url("s")], s3);
  sh(`rm "$1"/2*`, folder);
  s3.rclone(`rclone purge "$S/s"`);
  await nextSecond();
  const result = await expectRun(1, [source, `raw://${folder}`, s3.url("s")], s3);
  expect(
    logged(result.stderr).match(/is gone \(is the disk mounted\?\); --adopt begins anew/g)?.length,
  ).toBe(2);
  expect(filesIn(folder)).toEqual([]);
  await expectRun(0, ["-S", "--adopt", source, `raw://${folder}`, s3.url("s")], s3);
  expect((await expectRun(1, ["-S", source, `raw://${source}-store`])).stderr).toContain(
    "filesystem of",
  );
  expect((await expectRun(2, ["-S", source, `raw://${source}/snapshot/store`])).stderr).toContain(
    "snapshot folder",
  );
  expect((await expectRun(1, ["-S", source, `raw://${folder}/missing/store`])).stderr).toContain(
    "is the disk mounted?",
  );
  await expectRun(0, ["-S", source, "--optional", `raw://${folder}/missing/store`]);
});

test("no link that somebody plants in a store is written through, however fast they are", () => {
  const [folder, tools] = [temporaryDirectory(), temporaryDirectory()];
  const [victim, link] = [join(tools, "victim"), join(folder, ".object.part")];
  sh(
    `echo precious >"$1"; ln -s "$1" "$2"; printf '#!/bin/sh\\n' >"$3/rm"; chmod 755 "$3/rm"`,
    victim,
    link,
    tools,
  );
  const fsid = sh(`stat -f -c %i "$1"`, folder);
  const store = VERBS.find(({ name }) => name === "store") as Verb;
  const host = { label: "", ssh: null, sudo: false, beat: 15 };
  // With an rm that comes too late.
  expect(() =>
    sh(
      `echo stream | PATH="$1:$PATH" sh -c "$2"`,
      tools,
      commandFor(host, store, [folder, fsid, "", "object", "", ""]),
    ),
  ).toThrow();
  expect(readFileSync(victim, "utf8")).toBe("precious\n");
  sh(`echo stream | sh -c "$1"`, commandFor(host, store, [folder, fsid, "", "object", "", ""]));
  expect([readFileSync(victim, "utf8"), readFileSync(link, "utf8")]).toEqual([
    "precious\n",
    "stream\n",
  ]);
});

test("any filesystem will do; where it is full, --make-room deletes dead chains only", async () => {
  const { source, snapshots, b } = pair();
  const disk = join(temporaryDirectory(), "disk");
  sh(
    `mkdir "$1"; truncate -s 60M "$1.img"; mkfs.ext4 -qF "$1.img"; mount -o loop "$1.img" "$1"`,
    disk,
  );
  try {
    const store = `raw://${disk}/s`;
    const args = ["-S", "--full-every", "1", source, store];
    for (const day of [1, 2, 3]) {
      sh(`head -c 15M /dev/urandom >"$1/large"`, source);
      snapshotAs(source, `2026010${day}-000000`);
    }
    await run(args);
    const before = [...(await listed(store)).keys()];
    expect(before.length).toBeGreaterThan(1);
    sh(`head -c 25M /dev/urandom >"$1/large"`, source);
    snapshotAs(source, "20260104-000000");
    expect((await expectRun(1, ["--newest-only", ...args])).stderr).toContain("are free there");
    const tried = await expectRun(1, ["--newest-only", "--skip-space-check", ...args]);
    expect(tried.stderr).toContain("No space left on device");
    expect([...(await listed(store)).keys()]).toEqual(before);
    expect(readdirSync(join(disk, "s")).filter((name) => name.endsWith(".part"))).toEqual([]);
    await expectRun(0, ["--newest-only", "-n", "1", "--make-room", ...args]);
    expect([...(await listed(store)).keys()]).toEqual(["20260104-000000"]);
    await expectRestores(
      store,
      join(b.path, "again"),
      "20260104-000000",
      contentsDigest(join(snapshots, "20260104-000000")),
    );
  } finally {
    sh(`umount "$1"`, disk);
  }
});

test("every login shell of a server stores, lists, gives back and deletes", async () => {
  const { source, b } = pair();
  const server = await sshServer();
  for (const day of [1, 2])
    snapshotAs(source, `odd 'pre!fix\\${day === 1 ? "" : ""}2026010${day}-000000`);
  const prefix = ["-p", "odd 'pre!fix\\"];
  for (const [name, shell] of Object.entries(loginShells())) {
    server.user(`store-${name}`, shell);
    const store = server
      .url(`${temporaryDirectory()}/odd $(x) 'dir`, `store-${name}`)
      .replace(/^ssh:/, "raw+ssh:");
    await expectRun(0, [
      ...server.options,
      ...prefix,
      "-S",
      "-n",
      "1",
      "--full-every",
      "1",
      source,
      store,
    ]);
    const [list] = events(await expectRun(0, ["list", "--json", ...server.options, store]));
    expect([name, list?.["snapshots"].map(({ name }: { name: string }) => name)]).toEqual([
      name,
      [`${prefix[1]}20260102-000000`],
    ]);
    await expectRun(0, ["restore", ...server.options, store, join(b.path, name)]);
    expect(contentsDigest(join(b.path, name))).toBe(contentsDigest(source));
  }
});

test("backups are copied into a store, and restored from it where parts of the chain already are", async () => {
  const { source, snapshots, destination, b } = pair();
  const folder = temporaryDirectory();
  for (const day of [1, 2, 3]) {
    change(source, generator(day));
    snapshotAs(source, `2026010${day}-000000`);
  }
  await expectRun(0, ["-S", source, destination]);
  const copied = transfers(await expectRun(0, ["copy", "--json", destination, `raw://${folder}`]));
  expect(copied.map(({ parent }) => parent)).toEqual([null, "20260101-000000", "20260102-000000"]);
  expect(transfers(await expectRun(0, ["copy", "--json", destination, `raw://${folder}`]))).toEqual(
    [],
  );
  // Its source goes on there.
  change(source, generator(4));
  snapshotAs(source, "20260104-000000");
  expect(transfers(await expectRun(0, ["--json", "-S", source, `raw://${folder}`]))).toMatchObject([
    { name: "20260104-000000", parent: "20260103-000000" },
  ]);
  // What is beside TARGET is not fetched again.
  const place = subvolume(join(filesystem().path, "place"));
  sh(`btrfs -q send "$1/20260102-000000" | btrfs -q receive "$2"`, snapshots, place);
  const result = await expectRun(0, ["restore", "--json", `raw://${folder}`, join(place, "again")]);
  expect(transfers(result).map(({ name, parent }) => [name, parent])).toEqual([
    ["20260103-000000", "20260102-000000"],
    ["20260104-000000", "20260103-000000"],
  ]);
  expect(contentsDigest(join(place, "again"))).toBe(
    contentsDigest(join(snapshots, "20260104-000000")),
  );
  expect(snapshotNames(place)).toEqual(["20260102-000000"]);
  // A dry run fetches nothing, and a hint tells those who forget raw://.
  expect(
    (await expectRun(0, ["restore", "--dry-run", `raw://${folder}`, join(b.path, "dry")])).stderr,
  ).toContain("Would restore 20260104-000000");
  expect(existsSync(join(b.path, "dry"))).toBe(false);
  expect((await expectRun(1, ["restore", folder, join(b.path, "dry")])).stderr).toContain(
    `raw://${folder}`,
  );
});

test("the versions of a file are those in subvolumes; verify takes folders and streams together", async () => {
  const { source, destination } = pair();
  const folder = temporaryDirectory();
  await expectRun(0, [source, destination, `raw://${folder}`]);
  const versions = await expectRun(0, ["versions", join(source, "plain/1")]);
  expect(versions.stderr).toContain(`raw://${folder} is not looked into`);
  const verified = await expectRun(0, ["verify", "--json", source, destination, `raw://${folder}`]);
  expect(
    events(verified)
      .filter(({ event }) => event === "verify")
      .map(({ location, equal }) => [location, equal]),
  ).toEqual([
    [`raw://${folder}`, true],
    [destination, true],
  ]);
  expect(
    events(await expectRun(0, ["list", "--json", "--size", source]))[0]?.["snapshots"][0].at.map(
      ({ bytes }: { bytes: number }) => bytes > 0,
    ),
  ).toEqual([true, true, true]);
  expect((await expectRun(0, ["list", "--max-age", "1h", `raw://${folder}`])).stdout).toContain(
    "OK",
  );
});

test("a command gets a stream that is compressed and encrypted, and is told how it ends", async () => {
  const { source, snapshots } = pair();
  const gpg = gpgKey();
  const folder = temporaryDirectory();
  await expectRun(
    0,
    [
      "--compress",
      "zstd",
      "--encrypt-to",
      gpg.recipient,
      "--rate-limit",
      "500m",
      source,
      `shell://cat >${folder}/$BTRFS_BACKUP_NAME$BTRFS_BACKUP_SUFFIX`,
    ],
    gpg,
  );
  const [name = ""] = snapshotNames(snapshots);
  const target = filesystem();
  sh(
    `export GNUPGHOME="$1"; gpg --batch --quiet --decrypt "$2/$3.btrfs.zst.gpg" | zstd -dc | btrfs -q receive "$4"`,
    gpg.env["GNUPGHOME"] ?? "",
    folder,
    name,
    target.path,
  );
  expectSameTree(join(snapshots, name), join(target.path, name));
  // From another host as well, where it is compressed before it travels.
  const { options, url } = await sshServer();
  await nextSecond();
  await expectRun(0, [
    "--compress",
    "zstd",
    ...options,
    url(source),
    `shell://cat >${folder}/remote$BTRFS_BACKUP_SUFFIX`,
  ]);
  sh(`zstd -q -t "$1/remote.btrfs.zst"`, folder);
});

test("the rate of a destination is its own, and a pull goes into a store as well", async () => {
  const { source } = pair();
  const { options, url } = await sshServer();
  const folder = temporaryDirectory();
  const { stderr } = await expectRun(0, [
    "-v",
    "debug",
    ...options,
    url(source),
    `raw://${folder}/fast`,
    "--for",
    `raw://${folder}/slow`,
    "--rate-limit",
    "100m",
  ]);
  expect(stderr.match(/relay \{"rate":104857600,"sum":true\}/g)?.length).toBe(1);
  expect(stderr.match(/relay \{"sum":true\}/g)?.length).toBe(1);
  await expectRun(0, ["verify", `raw://${folder}/fast`, `raw://${folder}/slow`]);
});

test("streams of protocol 2 are stored when asked for, and come back", async () => {
  const a = filesystem({ mount: "noatime,compress-force=zstd" });
  const source = subvolume(join(a.path, "home"));
  fill(source);
  sh(`head -c 20M /dev/zero >"$1/zeros"`, source);
  const folder = temporaryDirectory();
  await expectRun(0, [source]);
  const [one, two] = [
    transfers(await expectRun(0, ["--json", "-S", source, `raw://${folder}/x1`]))[0]?.["bytes"],
    transfers(
      await expectRun(0, ["--json", "-S", "--protocol", "2", source, `raw://${folder}/x2`]),
    )[0]?.["bytes"],
  ];
  expect(two).toBeLessThan(one / 2);
  for (const [name, version] of [
    ["x1", 1],
    ["x2", 2],
  ] as const)
    expect(sh(`od -An -tu4 -j 13 -N 4 "$1"/2*.btrfs | tr -d ' '`, join(folder, name))).toBe(
      String(version),
    );
  await expectRun(0, ["restore", `raw://${folder}/x2`, join(filesystem().path, "again")]);
});

test("a store is made in a subvolume of btrfs as anywhere", async () => {
  const { source } = pair();
  const home = subvolume(join(filesystem().path, "@home"));
  await expectRun(0, [source, `raw://${home}/stored`]);
  await expectRun(0, ["verify", `raw://${home}/stored`]);
});
