// Send streams made by hand, after linux/fs/btrfs/send.h, and real ones.

import { spawnSync } from "node:child_process";

const COMMANDS = { subvol: 1, snapshot: 2, mkfile: 3, mkdir: 4, mknod: 5, mkfifo: 6, symlink: 8, rename: 9, link: 10, unlink: 11, rmdir: 12, write: 15, clone: 16, truncate: 17, chmod: 18, chown: 19, utimes: 20, end: 21, encoded_write: 25 };

const TABLE = Array.from({ length: 256 }, (_, n) => {
  let c = n;
  for (let k = 0; k < 8; k++) c = c & 1 ? 0x82f63b78 ^ (c >>> 1) : c >>> 1;
  return c >>> 0;
});
/** CRC-32C as btrfs uses it here: neither begun nor ended with an inversion. */
const crc = (bytes: Buffer) => bytes.reduce((c, byte) => ((TABLE[(c ^ byte) & 0xff] as number) ^ (c >>> 8)) >>> 0, 0);

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
const dataOf2 = (value: string) => Buffer.concat([Buffer.from([19, 0]), Buffer.from(value, "latin1")]);
const text = (type: number) => (value: string) => of(type)(Buffer.from(value, "latin1"));
const uuid = (type: number) => (value: string) => of(type)(Buffer.from(value.replaceAll("-", ""), "hex"));
const time = (type: number) => () => of(type)(Buffer.alloc(12));

/** Attributes of commands. */
export const attribute = { uuid: uuid(1), ctransid: number(2), ino: number(3), size: number(4), mode: number(5), uid: number(6), gid: number(7), rdev: number(8), ctime: time(9), mtime: time(10), atime: time(11), path: text(15), pathTo: text(16), pathLink: text(17), offset: number(18), data: text(19), cloneUuid: uuid(20), cloneCtransid: number(21), clonePath: text(22), cloneOffset: number(23), cloneLength: number(24), unencodedFileLength: number(27), unencodedLength: number(28), unencodedOffset: number(29), compression: small(30), dataOf2 };

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
export const stream = (...commands: Buffer[]) => Buffer.concat([Buffer.from("btrfs-stream\0\x01\0\0\0", "latin1"), ...commands]);

/** What `btrfs send` says. */
export const streamOf = (snapshot: string, parent: string | null = null, ...options: string[]) => spawnSync("btrfs", ["send", "-q", ...options, ...(parent === null ? [] : ["-p", parent]), snapshot], { maxBuffer: 1 << 28 }).stdout;
