import { Client } from "../client.js";
import { tokenOf } from "../token.js";
import { type ClientOptions, clientOptions } from "./options.js";

/** `kvferry ping`: tells how long the server takes to answer. */
export async function ping(args: string[]): Promise<void> {
	const options = clientOptions(args);
	const ms = await query(options, (client) => client.ping({ timeoutMs: options.timeoutMs }));
	const { url } = options;
	process.stdout.write(
		options.json ? `${JSON.stringify({ url, ms })}\n` : `${url} answered in ${ms.toFixed(2)} ms\n`,
	);
}

/** `kvferry clear`: empties the cache. */
export async function clear(args: string[]): Promise<void> {
	const options = clientOptions(args);
	await query(options, (client) => client.clear({ timeoutMs: options.timeoutMs }));
	const { url } = options;
	process.stdout.write(
		options.json
			? `${JSON.stringify({ url, cleared: true })}\n`
			: `${url} keeps only what is leased or being written\n`,
	);
}

async function query<T>(options: ClientOptions, ask: (client: Client) => Promise<T>): Promise<T> {
	const { url, timeoutMs } = options;
	const client = await Client.connect({
		url,
		timeoutMs,
		token: tokenOf(options, ["admin", "data"]),
	});
	try {
		return await ask(client);
	} finally {
		await client.close({ timeoutMs });
	}
}
