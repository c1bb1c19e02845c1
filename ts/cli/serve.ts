import { Server } from "../server.js";
import { serveOptions } from "./options.js";

/** `kvferry serve`: runs a server until SIGINT or SIGTERM. */
export async function serve(args: string[]): Promise<void> {
	const { json, ...options } = serveOptions(args);
	const server = await Server.start(options);
	const { shmName, httpAddress } = server;
	const url = `tcp://${server.address}`;
	const http = httpAddress === undefined ? {} : { httpUrl: `http://${httpAddress}` };
	const { memory, ipc } = options;
	const socket = ipc === undefined ? {} : { ipcUrl: `ipc://${ipc}` };
	process.stdout.write(
		json
			? `${JSON.stringify({ url, shmName, memory, ...http, ...socket })}\n`
			: `kvferry serves ${url} from pool ${shmName} of ${memory} bytes\n`,
	);
	if (!json && socket.ipcUrl !== undefined) {
		process.stdout.write(`and ${socket.ipcUrl}\n`);
	}
	if (!json && http.httpUrl !== undefined) {
		process.stdout.write(`its page, health and metrics: ${http.httpUrl}\n`);
	}
	await stopSignal();
	await server.close();
}

function stopSignal(): Promise<void> {
	return new Promise((resolve) => {
		process.once("SIGINT", () => resolve());
		process.once("SIGTERM", () => resolve());
	});
}
