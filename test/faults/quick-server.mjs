// `kvferry serve` with deadlines that a test can wait for. Argument: ServerOptions as JSON.

import { Server } from "../../dist/index.js";

const server = await Server.start({ port: 0, ...JSON.parse(process.argv[2] ?? "{}") });
process.stdout.write(
	`${JSON.stringify({ url: `tcp://${server.address}`, shmName: server.shmName })}\n`,
);
process.once("SIGTERM", () => server.close());
