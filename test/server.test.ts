// A server's HTTP side, as an application starts it.

import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { Server } from "../ts/index.js";

const memory = 2 ** 20;

describe("a server with httpPort", () => {
	it("tells where it answers HTTP, and answers there until it is closed", async () => {
		const server = await Server.start({ port: 0, httpPort: 0, memory });
		expect(server.httpAddress).toMatch(/^127\.0\.0\.1:\d+$/);
		expect(server.httpAddress).not.toBe(server.address);
		const url = `http://${server.httpAddress}`;
		await expect.poll(async () => (await fetch(`${url}/readyz`)).status).toBe(200);
		const status = (await (await fetch(`${url}/status`)).json()) as Record<string, unknown>;
		expect(status).toMatchObject(server.status());
		await server.close();
		await expect(fetch(`${url}/healthz`)).rejects.toThrow();
		await server.close();
	});

	it("refuses a port that is taken, and gives the data port back", async () => {
		await using server = await Server.start({ port: 0, httpPort: 0, memory });
		const httpPort = Number(server.httpAddress?.split(":")[1]);
		const port = await freePort();
		await expect(Server.start({ port, httpPort, memory })).rejects.toMatchObject({
			code: "ADDRESS_IN_USE",
			message: expect.stringMatching(/HTTP.*httpPort/),
		});
		await using _other = await Server.start({ port, memory });
	});

	it.each([-1, 1.5, 65_536, Number.NaN, "8080"])("refuses %j", async (httpPort) => {
		await expect(
			Server.start({ port: 0, httpPort: httpPort as number, memory }),
		).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
	});

	it.each([
		["httpPort", 0],
		["port", 0],
		["host", "127.0.0.1"],
		["shmName", "pool"],
		["listenPublic", true],
		["tokenFile", "/tokens"],
		["ipc", "/run/kvferry/ipc"],
	])("listens to nobody when it does not listen: refuses %s", async (name, value) => {
		const options = { listen: false, memory, [name]: value };
		await expect(Server.start(options)).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: `${name} is ${JSON.stringify(value)}, with listen: false; leave one of them out`,
		});
	});
});

describe("a server without", () => {
	it("answers no HTTP", async () => {
		await using server = await Server.start({ port: 0, memory });
		expect(server.httpAddress).toBeUndefined();
	});
});

/** One that was free a moment ago. */
async function freePort(): Promise<number> {
	await using server = await Server.start({ port: 0, memory });
	return Number(server.address?.split(":")[1]);
}

it("starts with no option that it does not know", async () => {
	const starting = Server.start({ port: 0, Disk: "/tmp" } as never);
	await expect(starting).rejects.toMatchObject({
		code: "INVALID_ARGUMENT",
		message: 'Server.start has no option "Disk": did you mean disk?',
	});
});

it("says that what is to be a directory is a file", async () => {
	const disk = fileURLToPath(import.meta.url);
	await expect(Server.start({ listen: false, memory, disk })).rejects.toMatchObject({
		code: "INVALID_ARGUMENT",
		message: expect.stringContaining(`disk ${disk} is a file: give a directory`),
	});
});

it.each([
	[{ listen: "false" }, /^listen is "false": it must be true or false/],
	[{ keepAlive: 1 }, /^keepAlive is 1: it must be/],
	[{ disk: "" }, /^disk is empty/],
	[{ quotas: "" }, /^quotas is empty/],
	[{ remote: "" }, /^remote is empty/],
	[{ shmName: "" }, /^shmName is empty/],
	[{ memory: 2 ** 44 }, /^memory is 17592186044416: .* to 17592186040320/],
])("refuses %j by name", async (options, message) => {
	await expect(Server.start({ port: 0, memory, ...options } as never)).rejects.toMatchObject({
		code: "INVALID_ARGUMENT",
		message: expect.stringMatching(message),
	});
});

it("refuses the size of a disk without the disk", async () => {
	const starting = Server.start({ listen: false, memory, diskSize: 2 ** 20 });
	await expect(starting).rejects.toMatchObject({
		code: "INVALID_ARGUMENT",
		message: expect.stringMatching(/^diskSize 1048576 .* disk, too/),
	});
});
