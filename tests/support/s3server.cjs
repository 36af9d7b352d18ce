// The S3 server of the tests. s3rver answers a PUT before the file has what it got; this one, afterwards.
const { stat } = require("node:fs/promises");
const { setTimeout } = require("node:timers/promises");
const Store = require("s3rver/lib/stores/filesystem");

const { putObject } = Store.prototype;
Store.prototype.putObject = async function (object) {
  const put = await putObject.call(this, object);
  while ((await stat(this.getResourcePath(object.bucket, object.key, "object"))).size < put.size)
    await setTimeout(2);
  return put;
};
require("s3rver/bin/s3rver");
