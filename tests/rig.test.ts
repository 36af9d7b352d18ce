// The rig's own promises: if these fail, no other test means anything.

import { expect, test } from "bun:test";
import { appendFileSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  expectSameTree,
  filesystem,
  fill,
  gpgKey,
  loginShells,
  s3Server,
  sh,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
  treeDigest,
} from "./support/rig.ts";
import { generator } from "./support/random.ts";

const [a, b] = [filesystem(), filesystem()];
const source = subvolume(join(a.path, "source"));

test("a filesystem is mounted, and has the UUID that it says", () => {
  expect(sh(`findmnt -no FSTYPE "$1"; findmnt -no UUID "$1"`, a.path)).toBe(`btrfs\n${a.uuid}`);
  expect(a.uuid).not.toBe(b.uuid);
});

test("a filled and changed tree has the same digest after send and receive, full and incremental", () => {
  fill(source);
  sh(
    `btrfs -q subvolume snapshot -r "$1" "$2/1"; btrfs -q send "$2/1" | btrfs -q receive "$3"`,
    source,
    a.path,
    b.path,
  );
  expectSameTree(join(a.path, "1"), join(b.path, "1"));
  for (let i = 0; i < 10; i++) change(source, generator(i));
  sh(
    `btrfs -q subvolume snapshot -r "$1" "$2/2"; btrfs -q send -p "$2/1" "$2/2" | btrfs -q receive "$3"`,
    source,
    a.path,
    b.path,
  );
  expectSameTree(join(a.path, "2"), join(b.path, "2"));
  expect(treeDigest(join(a.path, "1"))).not.toBe(treeDigest(join(a.path, "2")));
  const [sent, received] = [subvolumes(a.path), subvolumes(b.path)];
  expect([...received.keys()]).toEqual(["1", "2"]);
  expect(received.get("2")).toMatchObject({ receivedUuid: sent.get("2")?.uuid, readonly: true });
  expect(sent.get("source")).toMatchObject({ receivedUuid: null, readonly: false });
});

const differences: Record<string, string> = {
  "one byte, with the same size and times": `t=$(stat -c %y plain/20); printf X | dd of=plain/20 bs=1 seek=3 conv=notrunc 2>/dev/null; touch -d "$t" plain/20`,
  "a nanosecond": `touch -d '2001-02-03 04:05:06.123456788' plain/4`,
  "an extended attribute": `setfattr -n user.note -v other plain/6`,
  "an ACL": `setfacl -m u:1234:r plain/7`,
  "an owner": `chown 1235 plain/3`,
  "a broken hard link": `t=$(stat -c %y plain); d=$(stat -c %y plain/deep); cp -a plain/5 x; mv x plain/5; touch -d "$t" plain; touch -d "$d" plain/deep`,
  "an empty directory": `t=$(stat -c %y .); mkdir 'odd names/more'; touch -d "$t" .`,
};
for (const [what, script] of Object.entries(differences))
  test(`a digest tells: ${what}`, () => {
    const copy = join(a.path, `copy ${what}`);
    const untouched = join(a.path, `untouched ${what}`);
    sh(
      `btrfs -q subvolume snapshot "$1/1" "$2"; btrfs -q subvolume snapshot "$1/1" "$3"`,
      a.path,
      copy,
      untouched,
    );
    expectSameTree(untouched, join(a.path, "1"));
    sh(`cd "$1"; ${script}`, copy);
    expect(() => expectSameTree(join(a.path, "1"), copy)).toThrow();
  });

test("sshd lets every login shell in, and each is the one it says", async () => {
  const server = await sshServer();
  const options = server.options.map((word) => (word === "--ssh-opt" ? "-o" : word));
  const ask = (user: string, command: string) => {
    const { port } = new URL(server.url("/", user));
    return sh(
      `user=$1 port=$2 command=$3; shift 3; ssh -o BatchMode=yes "$@" -p "$port" -l "$user" 127.0.0.1 "$command"`,
      user,
      port,
      command,
      ...options,
    );
  };
  for (const [name, shell] of Object.entries(loginShells())) {
    server.user(`rig-${name}`, shell);
    // The parent of what it runs is the shell itself; "; true" keeps it from stepping aside.
    const executable =
      name === "ash" ? sh("realpath $(command -v busybox)") : sh(`realpath "$1"`, shell);
    expect(ask(`rig-${name}`, "id -u; sh -c 'readlink /proc/$PPID/exe'; true")).toBe(
      `0\n${executable}`,
    );
  }
  server.user("rig-plain", "/bin/sh", 4242);
  expect(ask("rig-plain", "id -u; cd; touch mine; ls")).toBe("4242\nmine");
});

test("aws and the S3 server: what is put is what comes back", async () => {
  const { endpoint, env } = await s3Server("bucket");
  const file = join(temporaryDirectory(), "file");
  writeFileSync(file, Buffer.alloc(20 << 20, "btrfs")); // more than one part of a multipart upload
  const settings = Object.entries(env).map(([name, value]) => `${name}=${value}`);
  sh(
    `file=$1 endpoint=$2; shift 2; export "$@"; aws --endpoint-url "$endpoint" s3 cp - "s3://bucket/a b" <"$file" && aws --endpoint-url "$endpoint" s3 cp "s3://bucket/a b" - >"$file.back"; cmp "$file" "$file.back"`,
    file,
    endpoint,
    ...settings,
  );
});

test("gpg encrypts to its recipient, and decrypts", () => {
  const { env, recipient } = gpgKey();
  const file = join(temporaryDirectory(), "file");
  appendFileSync(file, "secret\n");
  sh(
    `export GNUPGHOME="$1"; gpg --batch --quiet --encrypt --recipient "$2" <"$3" >"$3.gpg"; ! grep -q secret "$3.gpg"; gpg --batch --quiet --decrypt <"$3.gpg" >"$3.back"`,
    env["GNUPGHOME"] ?? "",
    recipient,
    file,
  );
  expect(readFileSync(`${file}.back`, "utf8")).toBe("secret\n");
});
