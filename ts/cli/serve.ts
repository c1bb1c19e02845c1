import { Server } from "../server.js";
import { serveOptions } from "./options.js";
import { SERVE, settingsJson, settingsTable } from "./settings.js";

/** `kvferry serve`: runs a server until SIGINT or SIGTERM. */
export async function serve(args: string[]): Promise<void> {
	const { found, settings, printConfig, json } = serveOptions(args);
	if (printConfig) {
		process.stdout.write(
			json ? `${JSON.stringify(settingsJson(SERVE, found))}\n` : settingsTable(SERVE, found),
		);
		return;
	}
	const server = await Server.start(settings);
	const { shmName, httpAddress } = server;
	const url = `tcp://${server.address}`;
	const http = httpAddress === undefined ? {} : { httpUrl: `http://${httpAddress}` };
	const { memory } = settings;
	process.stdout.write(
		json
			? `${JSON.stringify({ url, shmName, memory, ...http })}\n`
			: `kvferry serves ${url} from pool ${shmName} of ${memory} bytes\n`,
	);
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
