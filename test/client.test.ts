import { expect, it } from "vitest";
import { Client, Server } from "../ts/index.js";

it("a client whose close was refused for its options is open, and closes later", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20 });
	const client = await Client.connect({ url: `tcp://${server.address}` });
	await expect(client.close({ timeoutMs: 0 })).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
	expect(await client.ping()).toBeGreaterThan(0);
	await client.close();
	await client.close();
	await expect(client.ping()).rejects.toMatchObject({ code: "CLOSED" });
});

it("a close that is aborted stops waiting and goes on", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20 });
	const client = await Client.connect({ url: `tcp://${server.address}` });
	await expect(client.close({ signal: AbortSignal.abort() })).rejects.toMatchObject({
		code: "ABORTED",
	});
	await expect(client.ping()).rejects.toMatchObject({ code: "CLOSED" });
	await client.close();
});
