// Running without root: btrfs alone goes through sudo.

import { expect, test } from "bun:test";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import { events, expectRun, expectSound, nextSecond, pair, ROOT, sh, snapshotNames, sshServer, temporaryDirectory } from "./support/rig.ts";

test("an ordinary user with the README's sudoers line backs up, here and over ssh", async () => {
  const { source, snapshots, destination, b } = pair();
  const { options, url, user } = await sshServer();
  user("saver", "/bin/bash", 4711);
  const directory = temporaryDirectory();
  // Private copies over the real ones, as for the user database.
  sh(`echo 'saver ALL=(root) NOPASSWD: /usr/bin/btrfs' >"$1/sudoers"; chmod 440 "$1/sudoers"; mount --bind "$1/sudoers" /etc/sudoers; chmod 755 "$1"`, directory);
  sh(`mkdir "$1" "$2" "$3"; chown 4711 "$1" "$2" "$3"; cp "$4" "$4.backup"; chown 4711 "$4.backup"; chmod 600 "$4.backup"; chmod 755 "$(dirname "$4")"; chmod 644 "$(dirname "$4")/known"`, snapshots, destination, join(b.path, "pushed"), options[1]?.slice("IdentityFile=".length) ?? "");
  const own = options.map((option) => (option.startsWith("IdentityFile=") ? `${option}.backup` : option));
  // The checkout can be where this user may not look.
  sh(`cp "$1" "$2/btrfs-backup"`, join(ROOT, "dist/btrfs-backup"), directory);
  const how = [join(directory, "btrfs-backup")];
  const wrapper = ["setpriv", "--reuid", "4711", "--regid", "4711", "--clear-groups", "env", "HOME=/tmp"];
  writeFileSync(join(source, "secret"), "root's", { mode: 0o600 });
  for (let i = 0; i < 3; i++) {
    const result = await expectRun(0, ["--json", "--sudo", "--ssh-sudo", "-N", "2", "-n", "2", ...own, source, destination, url(join(b.path, "pushed"), "saver")], { how, wrapper, cwd: "/" });
    if (i > 0) expect(events(result).filter(({ event }) => event === "transfer").every(({ parent }) => parent !== null)).toBe(true);
    await nextSecond();
  }
  for (const folder of [destination, join(b.path, "pushed")]) {
    expectSound(folder, snapshots);
    expect(snapshotNames(folder).length).toBe(2);
  }
  const pushed = url(join(b.path, "pushed"), "saver");
  const listed = await expectRun(0, ["list", "--json", "--sudo", "--ssh-sudo", ...own, source, destination, pushed], { how, wrapper, cwd: "/" });
  expect(events(listed)[0]?.["snapshots"].map(({ at }: { at: { state: string }[] }) => at.map(({ state }) => state))).toEqual([["whole", "whole", "whole"], ["whole", "whole", "whole"]]);
  for (const place of [destination, pushed]) await expectRun(0, ["prune", "--sudo", "--ssh-sudo", ...own, "-n", "1", place], { how, wrapper, cwd: "/" });
  for (const folder of [destination, join(b.path, "pushed")]) expect(snapshotNames(folder).length).toBe(1);
  const refused = await expectRun(1, ["-S", source, destination], { how, wrapper, cwd: "/" });
  expect(refused.stderr).toContain("Operation not permitted");
  sh(`umount /etc/sudoers`);
});
