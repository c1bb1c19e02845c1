import { Server } from "../server.js";
import { Log } from "./log.js";
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
	const { log: format = "text", diskSize, ...options } = settings;
	const ofDisk = options.disk === undefined || diskSize === undefined ? {} : { diskSize };
	const server = await Server.start({ ...options, ...ofDisk });
	const log = new Log(format);
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
	log.info("started", `process ${process.pid} serves ${url}`);
	log.follow(server);
	const signal = await stopSignal();
	log.end();
	log.info("stopping", `${signal}; what is not on the disk yet is written, for 30 s at most`);
	await server.close();
	log.info("stopped", `process ${process.pid}`);
}

/** The signal that ends the server. */
function stopSignal(): Promise<NodeJS.Signals> {
	return new Promise((resolve) => {
		process.once("SIGINT", resolve);
		process.once("SIGTERM", resolve);
	});
}
