import { once } from "node:events";
import { readFileSync } from "node:fs";
import { connect, type Socket } from "node:net";
import { afterEach, beforeEach, describe, expect, it } from "vitest";
import { Client, PrefixCache } from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";
import { payload, tokens } from "./prompts.mjs";

const BYTES = 10_000;
/** What an attack may leave of private memory: allocator slack, no more however often it is repeated. */
const SLACK_KIB = 16 * 1024;

/** ZMTP 3.1, NULL: the greeting and a DEALER's READY. */
const GREETING = Buffer.concat([
	Buffer.from([0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 1]),
	Buffer.from("NULL".padEnd(20, "\0")),
	Buffer.alloc(32),
]);
const READY = frame(Buffer.from("\x05READY\x0bSocket-Type\0\0\0\x06DEALER", "latin1"), 4);

let server: ServerProcess;
let client: Client;
let cache: PrefixCache;
const sockets: Socket[] = [];

beforeEach(async () => {
	server = await ServerProcess.start();
	client = await Client.connect({ url: server.url });
	cache = await PrefixCache.open({ via: client, identity: "floods", bytesPerChunk: BYTES });
	const stored = await cache.store(tokens(256, 1, 2), (chunk) => payload(1, chunk, BYTES));
	expect(stored.storedChunks).toBe(2);
});

afterEach(async () => {
	for (const socket of sockets.splice(0)) {
		socket.destroy();
	}
	await cache.close();
	await client.close();
	await server[Symbol.asyncDispose]();
});

function frame(body: Buffer, flags = 0): Buffer {
	if (body.length < 256) {
		return Buffer.concat([Buffer.from([flags, body.length]), body]);
	}
	const head = Buffer.alloc(9);
	head[0] = flags | 2;
	head.writeBigUInt64BE(BigInt(body.length), 1);
	return Buffer.concat([head, body]);
}

function message(...frames: Buffer[]): Buffer {
	return Buffer.concat(frames.map((body, at) => frame(body, at < frames.length - 1 ? 1 : 0)));
}

async function dial(): Promise<Socket> {
	const socket = connect(Number(server.port), "127.0.0.1");
	socket.on("error", () => {}); // being cut off is what some tests ask for
	sockets.push(socket);
	await once(socket, "connect");
	return socket.resume();
}

async function ended(socket: Socket): Promise<void> {
	if (!socket.closed) {
		await once(socket, "close");
	}
}

/** Private memory of the server, in KiB. */
function memory(): number {
	const status = readFileSync(`/proc/${server.process.pid}/status`, "utf8");
	return Number(/^RssAnon:\s+(\d+) kB/m.exec(status)?.[1]);
}

/** The other client's requests, with every byte checked. */
async function served(): Promise<void> {
	const loaded = await (await cache.lookup(tokens(256, 1, 2))).load();
	expect(loaded).toEqual([payload(1, 0, BYTES), payload(1, 1, BYTES)]);
}

describe("a server process under", () => {
	it("one-frame and malformed messages by the thousand: drops and counts them, serves others", async () => {
		const bad = [
			message(Buffer.from([0])), // one frame
			message(Buffer.from([0]), Buffer.from([99])), // no such operation
			message(Buffer.from([0]), Buffer.from([0xc1])), // no MessagePack at all
			message(Buffer.from([0]), Buffer.from([8]), Buffer.from([0x81]), Buffer.from([1])), // cut off
			message(Buffer.from([0]), Buffer.from([9]), Buffer.from([0xdd, 255, 255, 255, 255])), // 2^32 items
			message(Buffer.from([0]), Buffer.from([8]), Buffer.alloc(5_000, 0x91), Buffer.from([1])), // 5,000 deep
		];
		const round = async () => {
			const attackers = await Promise.all(Array.from({ length: 5 }, dial));
			for (const attacker of attackers) {
				attacker.write(Buffer.concat([GREETING, READY, ...Array(200).fill(bad).flat()]));
				// Its answer comes when all before it was dealt with.
				attacker.write(message(Buffer.from([7]), Buffer.from([24])));
			}
			await Promise.all(
				attackers.map(async (attacker) => {
					let seen = "";
					for await (const data of attacker) {
						seen += (data as Buffer).toString("latin1");
						if (seen.includes("OK")) {
							return;
						}
					}
					throw new Error("cut off before the good message was answered");
				}),
			);
			await served();
		};
		await round();
		const before = memory();
		for (let more = 0; more < 3; more++) {
			await round();
		}
		expect(memory() - before).toBeLessThan(SLACK_KIB);
		const { dropped_messages, dropped_too_few_frames } = await client.status();
		expect(dropped_messages).toBe(4 * 5 * 200 * bad.length);
		expect(dropped_too_few_frames).toBe(4 * 5 * 200);
	});

	it("announced sizes of 2^62, before and after the handshake: cuts them off at once", async () => {
		const header = Buffer.from([2, 0x40, 0, 0, 0, 0, 0, 0, 0]);
		const attack = async (bytes: Buffer) => {
			const attacker = await dial();
			attacker.write(bytes);
			await ended(attacker);
		};
		await attack(Buffer.concat([GREETING, header]));
		const before = memory();
		for (let round = 0; round < 50; round++) {
			await Promise.all([
				attack(Buffer.concat([GREETING, header])),
				attack(Buffer.concat([GREETING, READY, header])),
				attack(Buffer.alloc(64, 0x55)),
			]);
		}
		await served();
		expect(memory() - before).toBeLessThan(SLACK_KIB);
	});

	it("silent connections by the hundred: serves others, its memory flat", async () => {
		const before = memory();
		for (let count = 0; count < 150; count++) {
			await dial(); // nothing at all
			(await dial()).write(GREETING); // nothing after the greeting
			(await dial()).write(Buffer.concat([GREETING, READY])); // nothing after the handshake
			(await dial()).write(Buffer.concat([GREETING, READY, Buffer.from([1, 200])])); // half a message
		}
		await served();
		expect(await client.ping()).toBeGreaterThan(0);
		expect(memory() - before).toBeLessThan(SLACK_KIB);
	});
});
