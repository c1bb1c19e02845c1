import { Server } from "../server.js";
import { serveOptions } from "./options.js";

/** `kvferry serve`: runs a server until SIGINT or SIGTERM. */
export async function serve(args: string[]): Promise<void> {
	const { json, ...options } = serveOptions(args);
	const server = await Server.start(options);
	const { shmName } = server;
	const url = `tcp://${server.address}`;
	process.stdout.write(
		json
			? `${JSON.stringify({ url, shmName, memory: options.memory })}\n`
			: `kvferry serves ${url} from pool ${shmName} of ${options.memory} bytes\n`,
	);
	await stopSignal();
	await server.close();
}

function stopSignal(): Promise<void> {
	return new Promise((resolve) => {
		process.once("SIGINT", () => resolve());
		process.once("SIGTERM", () => resolve());
	});
}
