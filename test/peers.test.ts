// libzmq, the library that LMCache's peers use, against our server; test/peers/zmtp_peer.py says what
// each check is.

import { execFile } from "node:child_process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, beforeAll, describe, it } from "vitest";
import { ServerProcess } from "./server-process.js";

const PYTHON = fileURLToPath(new URL("../.cache/venv/bin/python", import.meta.url));
const PEER = fileURLToPath(new URL("peers/zmtp_peer.py", import.meta.url));

describe("libzmq", () => {
	let server: ServerProcess;

	beforeAll(async () => {
		server = await ServerProcess.start();
	});

	afterAll(() => server[Symbol.asyncDispose]());

	it.each([
		["shakes hands and is answered", "handshake"],
		["keeps its connection by heartbeats", "heartbeats"],
		["may connect twice with the same identity", "same_identity_twice"],
		["is refused with PLAIN, and others are served", "plain_is_refused"],
		["is refused as another socket type", "another_socket_type_is_refused"],
		["stores, looks up and retrieves through shared memory", "store_and_retrieve"],
		["sends thousands of requests at once", "pipelined"],
		["looks up a prompt of a million tokens", "long_prompt"],
	])("%s", async (_, check) => {
		await promisify(execFile)(PYTHON, [PEER, server.url, check]);
	});
});
