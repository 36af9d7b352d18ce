// What scripts/build makes for others: packages that can be installed, upgraded and removed, archives, and an executable that
// needs nothing of the tests to be built.

import { expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { pathWithout, ROOT, sh, temporaryDirectory } from "./support/rig.ts";

const DIST = join(ROOT, "dist");
const { version } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8"));
const packageFor = (architecture: string) =>
  join(DIST, `btrfs-backup_${version}_${architecture}.deb`);

/** A root directory of its own for dpkg, without any package. */
function emptySystem() {
  const root = temporaryDirectory();
  for (const directory of ["updates", "info"])
    mkdirSync(join(root, "var/lib/dpkg", directory), { recursive: true });
  for (const file of ["status", "available"]) writeFileSync(join(root, "var/lib/dpkg", file), "");
  // Of what the package depends on, nothing is in there.
  const dpkg = (...args: string[]) =>
    sh(
      `root=$1; shift; dpkg --root="$root" --log=/dev/null --force-depends "$@" 2>&1`,
      root,
      ...args,
    );
  return { root, dpkg };
}

test("the Debian package is installed, upgraded, removed and purged, and configuration stays", () => {
  const { root, dpkg } = emptySystem();
  dpkg("--install", packageFor("amd64"));
  const executable = join(root, "usr/sbin/btrfs-backup");
  const built = sh(`"$1" --version`, executable);
  expect(built).toStartWith(`btrfs-backup ${version} (`);
  expect(readdirSync(join(root, "etc/btrfs-backup"))).toEqual([]);
  const files = dpkg("--listfiles", "btrfs-backup").split("\n");
  for (const file of [
    "usr/share/man/man8/btrfs-backup.8.gz",
    "usr/share/man/man7/btrfs-backup-guide.7.gz",
    "usr/share/bash-completion/completions/btrfs-backup",
    "usr/share/zsh/vendor-completions/_btrfs-backup",
    "usr/share/fish/vendor_completions.d/btrfs-backup.fish",
    "usr/share/doc/btrfs-backup/examples/cron.daily",
    "usr/share/doc/btrfs-backup/examples/btrfs-backup.rules.yml",
    "usr/share/doc/btrfs-backup/examples/btrfs-backup.dashboard.json",
    "usr/lib/systemd/system/btrfs-backup@.timer",
    "usr/lib/systemd/system/btrfs-backup.service",
    "usr/lib/systemd/system/btrfs-backup.timer",
  ])
    expect(files).toContain(`/${file}`);
  expect(sh(`gzip -dc "$1"`, join(root, "usr/share/man/man8/btrfs-backup.8.gz"))).toBe(
    readFileSync(join(DIST, "btrfs-backup.8"), "utf8").trimEnd(),
  );
  const copyright = readFileSync(join(root, "usr/share/doc/btrfs-backup/copyright"), "utf8");
  for (const whose of ["citty", "consola", "zx", "Bun"])
    expect(copyright).toContain(
      `The executable holds ${whose === "Bun" ? "the runtime Bun" : whose}`,
    );
  // What is started is what is installed.
  const unit = join(root, "usr/lib/systemd/system/btrfs-backup@.service");
  const cron = join(root, "usr/share/doc/btrfs-backup/examples/cron.daily");
  const forAll = join(root, "usr/lib/systemd/system/btrfs-backup.service");
  for (const file of [unit, forAll, cron]) {
    expect(readFileSync(file, "utf8")).toContain("/usr/sbin/btrfs-backup ");
    expect(readFileSync(file, "utf8")).not.toContain("/usr/local");
  }
  const configuration = join(root, "etc/btrfs-backup/home.args");
  writeFileSync(configuration, "/home /backup\n");

  const newer = join(temporaryDirectory(), "newer.deb");
  sh(
    `work=$(mktemp -d); dpkg-deb -R "$1" "$work"; sed -i 's/^Version: .*/&+1/' "$work/DEBIAN/control"; rm "$work/usr/share/doc/btrfs-backup/README.md"; echo '#!/bin/sh' >"$work/usr/sbin/btrfs-backup"
    dpkg-deb --root-owner-group -Znone --build "$work" "$2" >/dev/null; rm -rf "$work"`,
    packageFor("amd64"),
    newer,
  );
  dpkg("--install", newer);
  expect(dpkg("--status", "btrfs-backup")).toContain(`Version: ${version}+1`);
  expect(existsSync(join(root, "usr/share/doc/btrfs-backup/README.md"))).toBe(false);
  expect(readFileSync(configuration, "utf8")).toBe("/home /backup\n");
  for (const how of ["--remove", "--purge"]) {
    dpkg(how, "btrfs-backup");
    expect(existsSync(executable)).toBe(false);
    expect(existsSync(unit)).toBe(false);
    expect(readFileSync(configuration, "utf8")).toBe("/home /backup\n");
    if (how === "--remove") dpkg("--install", packageFor("amd64"));
  }
});

test("each package says what it needs, and holds an executable for its machine", () => {
  for (const [architecture, machine] of Object.entries({ amd64: 62, arm64: 183 })) {
    const field = (name: string) =>
      sh(`dpkg-deb --field "$1" "$2"`, packageFor(architecture), name);
    expect(field("Architecture")).toBe(architecture);
    for (const name of ["btrfs-progs", "util-linux"]) expect(field("Depends")).toContain(name);
    for (const name of ["openssh-client", "zstd"]) expect(field("Recommends")).toContain(name);
    for (const name of ["gnupg", "rclone"]) expect(field("Suggests")).toContain(name);
    // elf(5): e_machine is the 19th byte.
    const byte = sh(
      `dpkg-deb --fsys-tarfile "$1" | tar -xO ./usr/sbin/btrfs-backup | od -A n -t u1 -j 18 -N 1 || :`,
      packageFor(architecture),
    );
    expect(Number(byte)).toBe(machine);
    const owners = sh(
      `dpkg-deb --contents "$1" | awk '{ print $2 }' | sort -u`,
      packageFor(architecture),
    );
    expect(owners).toBe("root/root");
  }
});

test("there is an archive for each platform, with a sum for each file that is given away", () => {
  const archives = readdirSync(DIST).filter((name) => name.endsWith(".tar.gz"));
  expect(archives).toHaveLength(5);
  expect(archives).toEqual(
    expect.arrayContaining(
      ["arm64", "arm64-musl", "x64", "x64-baseline", "x64-musl"].map(
        (platform) => `btrfs-backup-${version}-linux-${platform}.tar.gz`,
      ),
    ),
  );
  sh(`cd "$1"; sha256sum --quiet --strict -c SHA256SUMS`, DIST);
  const sums = readFileSync(join(DIST, "SHA256SUMS"), "utf8");
  for (const name of [...archives, `btrfs-backup_${version}_amd64.deb`])
    expect(sums).toContain(`  ${name}\n`);
  const directory = temporaryDirectory();
  sh(`tar -C "$1" -xzf "$2"`, directory, join(DIST, `btrfs-backup-${version}-linux-x64.tar.gz`));
  const inside = join(directory, `btrfs-backup-${version}-linux-x64`);
  expect(sh(`"$1/btrfs-backup" --version`, inside)).toStartWith(`btrfs-backup ${version} (`);
  for (const name of [
    "README.md",
    "LICENSE",
    "btrfs-backup.8",
    "btrfs-backup-guide.7",
    "cron.daily",
    "btrfs-backup@.timer",
    "btrfs-backup.service",
    "btrfs-backup.timer",
    "btrfs-backup.rules.yml",
    "btrfs-backup.dashboard.json",
  ])
    expect(readdirSync(inside)).toContain(name);
});

test("what is packed is the same each time", () => {
  const sum = () => sh(`sha256sum "$1"`, packageFor("arm64"));
  const before = sum();
  sh(`"$1/scripts/packages" "deb arm64 linux-arm64"`, ROOT);
  expect(sum()).toBe(before);
});

/** The project as somebody gets it, with no more than the packages that the program is built from. */
function checkout() {
  const project = join(temporaryDirectory(), "project");
  sh(
    `mkdir "$2"; cd "$1"; cp -R btrfs-backup.ts package.json package-lock.json README.md scripts "$2"
    mkdir "$2/node_modules" "$2/node_modules/.bin"; cd node_modules
    for one in bun citty consola zx @oven; do cp -RL "$one" "$2/node_modules/$one"; done
    ln -s ../bun/bin/bun.exe "$2/node_modules/.bin/bun"; cp ../package-lock.json "$2/node_modules/.installed-to-build"
    chown -R nobody "$2"`,
    ROOT,
    project,
  );
  return project;
}

test("to build it takes Bun and the three packages, no root, no apt, and nothing that only tests need", () => {
  const project = checkout();
  const path = pathWithout("apt-get", "git", "mkfs.btrfs", "sshd", "rclone", "sudo");
  sh(
    `cd "$1"; HOME=$1 PATH=$2 setpriv --reuid=nobody --clear-groups scripts/build 2>&1`,
    project,
    path,
  );
  const built = sh(`"$1/dist/btrfs-backup" --version`, project);
  expect(built).toStartWith(`btrfs-backup ${version} (no commit, Bun `);
});

test("where npm is not there, scripts/build says how to get it", () => {
  const project = checkout();
  sh(`rm -r "$1/node_modules"`, project);
  const told = sh(
    `cd "$1"; ! PATH=$2 scripts/build 2>&1`,
    project,
    pathWithout("npm", "node", "apt-get"),
  );
  expect(told).toContain("node not found: apt install nodejs npm, dnf install nodejs-npm");
});

test("the README begins with the download from where releases are, and with building as long as there is none", () => {
  const repository = /^repository=(.*)$/m.exec(
    readFileSync(join(ROOT, "scripts/packages"), "utf8"),
  )?.[1];
  const [, step = ""] =
    /^## Get it$(.*?)^## /ms.exec(readFileSync(join(ROOT, "README.md"), "utf8")) ?? [];
  const commands = [...step.matchAll(/^```sh\n(.*?)^```/gms)]
    .flatMap(([, block = ""]) => block.trimEnd().split("\n"))
    .map((line) => line.replace(/ {2,}#.*$/, ""));
  if (repository === "") expect(commands[0]).toBe("scripts/build");
  else {
    expect(commands[0]).toContain(`${repository}/releases/`);
    expect(commands[1]).toContain("sha256sum");
    expect(commands.indexOf("scripts/build")).toBeGreaterThan(1);
  }
});
