// A client of job-worker in Node: logs in, starts a job, reads its output, stops another job.
//
//     npm ci --omit=dev
//     node story.mjs localhost:50051 ../../certs user user
//
// It needs no generated code: proto-loader reads the .proto files when the program starts.

import { readFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import * as grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [address, certs, username, password] = process.argv.slice(2);
const protos = fileURLToPath(new URL("../..", import.meta.url));
const definition = loadSync(["authservice.proto", "workerservice.proto"], {
  includeDirs: [protos],
  keepCase: true, // field names as in the .proto
  enums: String, // "JOB_STATUS_RUNNING" instead of 1
  longs: Number,
});
const { AuthService, WorkerService } = grpc.loadPackageDefinition(definition).jobworker.v1;

const pem = (name) => readFileSync(join(certs, name));
const credentials = grpc.credentials.createSsl(
  pem("server-ca.pem"), pem("client-key.pem"), pem("client.pem"),
);
const auth = new AuthService(address, credentials);
const worker = new WorkerService(address, credentials);
const metadata = new grpc.Metadata();

// Return the answer to a call, or throw the error, whose `code` and `details` are gRPC's.
const call = (client, method, request) =>
  promisify(client[method]).call(client, request, metadata);

const { access_token } = await call(auth, "Login", { username, password });
metadata.set("authorization", `Bearer ${access_token}`);

const { job_id } = await call(worker, "StartJob", { command: "echo", args: ["hello from Node"] });
// A stream ends when its job has ended.
for await (const { data } of worker.StreamOutput({ job_id }, metadata)) process.stdout.write(data);
const { job } = await call(worker, "GetJobStatus", { job_id });
console.log(job.status, job.end_reason, job.exit_code);

const sleeper = await call(worker, "StartJob", { command: "sleep", args: ["1000000"] });
const stopped = (await call(worker, "StopJob", { job_id: sleeper.job_id })).job;
console.log(stopped.status, stopped.end_reason);

await call(auth, "Logout", {});
try {
  await call(worker, "ListJobs", {});
} catch (error) {
  console.log(grpc.status[error.code]);
}
auth.close();
worker.close();
