// Send streams made by hand, after linux/fs/btrfs/send.h, and real ones.

import { spawnSync } from "node:child_process";

const COMMANDS = {
  subvol: 1,
  snapshot: 2,
  mkfile: 3,
  mkdir: 4,
  mknod: 5,
  mkfifo: 6,
  symlink: 8,
  rename: 9,
  link: 10,
  unlink: 11,
  rmdir: 12,
  set_xattr: 13,
  write: 15,
  clone: 16,
  truncate: 17,
  chmod: 18,
  chown: 19,
  utimes: 20,
  end: 21,
  encoded_write: 25,
};

const TABLE = Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0x82f63b78 ^ (c >>> 1) : c >>> 1;
  return c >>> 0;
});
/** CRC-32C as btrfs uses it here: neither begun nor ended with an inversion. */
const crc = (bytes: Buffer) =>
  bytes.reduce((c, byte) => ((TABLE[(c ^ byte) & 0xff] as number) ^ (c >>> 8)) >>> 0, 0);

const of = (type: number) => (value: Buffer) => {
  const head = Buffer.alloc(4);
  head.writeUInt16LE(type, 0);
  head.writeUInt16LE(value.length, 2);
  return Buffer.concat([head, value]);
};
const number = (type: number) => (value: number) => {
  const bytes = Buffer.alloc(8);
  bytes.writeBigUInt64LE(BigInt(value));
  return of(type)(bytes);
};
const small = (type: number) => (value: number) => of(type)(Buffer.from([value, 0, 0, 0]));
/** Of protocol 2: it has no length of its own. */
const dataOf2 = (value: string) =>
  Buffer.concat([Buffer.from([19, 0]), Buffer.from(value, "latin1")]);
const text = (type: number) => (value: string) => of(type)(Buffer.from(value, "latin1"));
const uuid = (type: number) => (value: string) =>
  of(type)(Buffer.from(value.replaceAll("-", ""), "hex"));
const time = (type: number) => () => of(type)(Buffer.alloc(12));

/** Attributes of commands. */
export const attribute = {
  uuid: uuid(1),
  ctransid: number(2),
  ino: number(3),
  size: number(4),
  mode: number(5),
  uid: number(6),
  gid: number(7),
  rdev: number(8),
  ctime: time(9),
  mtime: time(10),
  atime: time(11),
  xattrName: text(13),
  xattrData: text(14),
  path: text(15),
  pathTo: text(16),
  pathLink: text(17),
  offset: number(18),
  data: text(19),
  cloneUuid: uuid(20),
  cloneCtransid: number(21),
  clonePath: text(22),
  cloneOffset: number(23),
  cloneLength: number(24),
  unencodedFileLength: number(27),
  unencodedLength: number(28),
  unencodedOffset: number(29),
  compression: small(30),
  dataOf2,
};

/** A command with its attributes, and the right CRC. */
export function command(name: keyof typeof COMMANDS | number, ...attributes: Buffer[]): Buffer {
  const body = Buffer.concat(attributes);
  const head = Buffer.alloc(10);
  head.writeUInt32LE(body.length, 0);
  head.writeUInt16LE(typeof name === "number" ? name : COMMANDS[name], 4);
  head.writeUInt32LE(crc(Buffer.concat([head, body])), 6);
  return Buffer.concat([head, body]);
}

/** A stream of protocol 1. */
export const stream = (...commands: Buffer[]) =>
  Buffer.concat([Buffer.from("btrfs-stream\0\x01\0\0\0", "latin1"), ...commands]);

/** What `btrfs send` says. */
export const streamOf = (snapshot: string, parent: string | null = null, ...options: string[]) =>
  spawnSync(
    "btrfs",
    ["send", "-q", ...options, ...(parent === null ? [] : ["-p", parent]), snapshot],
    { maxBuffer: 1 << 28 },
  ).stdout;

/** The header of a stream, and its commands. */
export function commandsOf(bytes: Buffer): Buffer[] {
  const parts = [bytes.subarray(0, 17)];
  for (let at = 17, length; at < bytes.length; at += length)
    parts.push(bytes.subarray(at, at + (length = 10 + bytes.readUInt32LE(at))));
  return parts;
}

const FOREIGN = "99999999-aaaa-bbbb-cccc-0123456789ab";
const [file, link] = [
  (path: string) => command("mkfile", attribute.path(path), attribute.ino(999)),
  (path: string, to: string) =>
    command("symlink", attribute.path(path), attribute.ino(998), attribute.pathLink(to)),
];
/** A command that writes, in both protocols: the data come last. */
const writing = (path: string, text: string, protocol: number) =>
  command(
    "write",
    attribute.path(path),
    attribute.offset(0),
    protocol === 2 ? attribute.dataOf2(text) : attribute.data(text),
  );

type Opening = {
  readonly name: string;
  readonly uuid: Buffer;
  readonly transid: Buffer;
  readonly parent: Buffer | null;
  readonly rest: Buffer;
};
/** What the first command of a stream says, and what follows its parent's UUID. */
function openingOf(first: Buffer): Opening {
  const of = new Map<number, Buffer>();
  for (let at = 10; at < first.length; at += 4 + first.readUInt16LE(at + 2))
    of.set(first.readUInt16LE(at), first.subarray(at, at + 4 + first.readUInt16LE(at + 2)));
  const [path, uuid, transid] = [15, 1, 2].map((type) => of.get(type) as Buffer) as [
    Buffer,
    Buffer,
    Buffer,
  ];
  return {
    name: path.subarray(4).toString(),
    uuid,
    transid,
    parent: of.get(20) ?? null,
    rest: of.get(21) ?? Buffer.alloc(0),
  };
}
const opening = ({ name, uuid, transid, parent, rest }: Opening) =>
  command(
    parent === null ? "subvol" : "snapshot",
    attribute.path(name),
    uuid,
    transid,
    ...(parent === null ? [] : [parent, rest]),
  );
const newly = (change: (one: Opening) => Partial<Opening>) => (honest: Buffer) => {
  const [header, first, ...others] = commandsOf(honest) as [Buffer, Buffer, ...Buffer[]];
  const one = openingOf(first);
  return Buffer.concat([header, opening({ ...one, ...change(one) }), ...others]);
};
/** Puts commands before the end. */
const with_ =
  (...more: ((protocol: number, one: Opening) => Buffer)[]) =>
  (honest: Buffer) => {
    const parts = commandsOf(honest);
    const one = openingOf(parts[1] as Buffer);
    return Buffer.concat([
      ...parts.slice(0, -1),
      ...more.map((make) => make(honest.readUInt32LE(13), one)),
      parts.at(-1) as Buffer,
    ]);
  };

/** What a host or a store can make of an honest stream. */
export const forgeries: Record<string, (honest: Buffer) => Buffer> = {
  "a path out of it": with_(
    () => file("../escaped"),
    (protocol) => writing("../escaped", "evil", protocol),
  ),
  "a path far out of it": with_(
    () => file("../../../escaped"),
    () => file("../../escaped"),
    (protocol) => writing("../../escaped", "evil", protocol),
  ),
  "a rename out of it": with_(
    () => file("inside"),
    () => command("rename", attribute.path("inside"), attribute.pathTo("../escaped")),
  ),
  "an absolute path": with_(() => file("/escaped")),
  "a second subvolume": with_(() =>
    command(
      "subvol",
      attribute.path("20991231-000000"),
      attribute.uuid(FOREIGN),
      attribute.ctransid(1),
    ),
  ),
  "another name": newly(() => ({ name: "20991231-000000" })),
  "a name elsewhere": newly(({ name }) => ({ name: `../${name}` })),
  "another UUID": newly(() => ({ uuid: attribute.uuid(FOREIGN) })),
  "another parent": newly(() => ({
    parent: attribute.cloneUuid(FOREIGN),
    rest: attribute.cloneCtransid(1),
  })),
  "no end": (honest) => honest.subarray(0, -10),
  "half a command": (honest) => honest.subarray(0, -4),
  "nothing but a beginning": (honest) => honest.subarray(0, 5),
  "itself twice": (honest) => Buffer.concat([honest, honest]),
  "its end twice": (honest) => Buffer.concat([honest, honest.subarray(-10)]),
  "an unknown command": with_(() => command(99, attribute.path("x"))),
  "a command longer than any": (honest) =>
    Buffer.concat([
      honest.subarray(0, -10),
      Buffer.from([0, 0, 32, 0, 15, 0, 0, 0, 0, 0]),
      Buffer.alloc(2 ** 21),
    ]),
  "an attribute longer than its command": with_(() =>
    command("mkfile", Buffer.from([15, 0, 255, 255, 65])),
  ),
  "a clone of another subvolume": with_(
    () => file("inside"),
    () =>
      command(
        "clone",
        attribute.offset(0),
        attribute.cloneLength(4096),
        attribute.path("inside"),
        attribute.cloneUuid(FOREIGN),
        attribute.cloneCtransid(1),
        attribute.clonePath("x"),
        attribute.cloneOffset(0),
      ),
  ),
  "encoded data that are longer than they say": (honest) =>
    with_(
      () => file("inside"),
      () =>
        command(
          "encoded_write",
          attribute.path("inside"),
          attribute.offset(0),
          attribute.unencodedFileLength(131072),
          attribute.unencodedLength(4096),
          attribute.unencodedOffset(0),
          attribute.compression(1),
          attribute.dataOf2("x"),
        ),
    )(Buffer.from(honest).fill(2, 13, 14)),
};

/** Harm by links that the stream itself makes; the kernel stops it at the fence. */
export const linkForgeries: Record<string, (honest: Buffer) => Buffer> = {
  "a link that is written through": with_(
    () => link("link", "../victim"),
    (protocol) => writing("link", "evil", protocol),
  ),
  "a link that a file is made through": with_(
    () => link("link", "../escaped"),
    () => file("link"),
  ),
  "a folder that is a link": with_(
    () => link("link", ".."),
    () => file("link/escaped"),
  ),
  "a link by its second name": with_(
    () => link("link", ".."),
    () => command("link", attribute.path("other"), attribute.pathLink("link")),
    () => command("rename", attribute.path("link"), attribute.pathTo("other")),
    () => file("link/escaped"),
  ),
};
