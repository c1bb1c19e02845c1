// libzmq, the library that LMCache's peers use, against our server; test/peers/zmtp_peer.py says what
// each check is.

import { execFile } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
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

describe("libzmq where there are tokens", () => {
	const directory = mkdtempSync(join(tmpdir(), "kvferry-peers-"));
	const file = join(directory, "tokens");
	const token = "d".repeat(32);
	const env = { ...process.env, PEER_TOKEN: token };

	beforeAll(() => {
		const lines = `data = ${token}\nadmin = ${"a".repeat(32)}\nmetrics = ${"m".repeat(32)}\n`;
		writeFileSync(file, lines, { mode: 0o600 });
	});

	afterAll(() => rmSync(directory, { recursive: true }));

	it("is let in by PLAIN, and by nothing else, on an address that others reach", async () => {
		const flags = ["--host", "0.0.0.0", "--listen-public", "--token-file", file];
		await using server = await ServerProcess.start(...flags);
		const url = `tcp://127.0.0.1:${server.port}`;
		for (const check of [
			"plain_with_the_token",
			"plain_with_another_token_is_refused",
			"null_is_refused",
		]) {
			await promisify(execFile)(PYTHON, [PEER, url, check], { env });
		}
	});

	it("needs none on loopback and at a Unix socket, and may show one", async () => {
		const ipc = join(directory, "sockets", "kvferry");
		for (const place of ["loopback", "ipc"]) {
			await using server = await ServerProcess.start("--token-file", file, "--ipc", ipc);
			const url = place === "ipc" ? `ipc://${ipc}` : server.url;
			for (const check of [
				"handshake",
				"store_and_retrieve",
				"heartbeats",
				"plain_with_the_token",
				"plain_with_another_token_is_refused",
			]) {
				await promisify(execFile)(PYTHON, [PEER, url, check], { env });
			}
		}
	});
});
