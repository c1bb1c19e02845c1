import { once } from "node:events";
import { type AddressInfo, createServer, type Server, type Socket } from "node:net";

/** LMCache's ids of the operations that {@link LmcacheServer} answers. */
const LOOKUP = 8;
const QUERY = 9;
const REGISTER = 14;
const CHUNK_SIZE = 21;
const NOOP = 24;
const EXPERIMENTAL = 32;

/** A greeting of ZMTP 3.0 with the NULL mechanism. */
const GREETING = Buffer.alloc(64);
GREETING.set([0xff, 0, 0, 0, 0, 0, 0, 0, 1, 0x7f, 3, 0]);
GREETING.write("NULL", 12);
const READY = command("\x05READY\x0bSocket-Type\0\0\0\x06ROUTER");

/** A server that answers lookups as LMCache's does, and has none of kvferry's operations. */
export class LmcacheServer implements AsyncDisposable {
	/** The ids of the operations it was asked, in their order. */
	readonly asked: number[] = [];
	readonly #server: Server;
	readonly #sockets = new Set<Socket>();

	private constructor(server: Server) {
		this.#server = server;
	}

	/**
	 * Starts one of this chunk size (below 128) whose every lookup finds `hits` chunks. It offers a pool of so many
	 * bytes (below 128) as a segment of this name; without, it does not answer registrations.
	 */
	static async start(
		chunkSize: number,
		hits: number,
		pool?: { name: string; bytes: number },
	): Promise<LmcacheServer> {
		const server = createServer();
		const lmcache = new LmcacheServer(server);
		const answers: Record<number, Buffer> = {
			[CHUNK_SIZE]: Buffer.of(chunkSize),
			[QUERY]: Buffer.of(hits),
			[NOOP]: text("OK"),
			[EXPERIMENTAL]: Buffer.of(0x90),
		};
		if (pool !== undefined) {
			const name = text(pool.name);
			const parts = [Buffer.of(0x82), text("shm_name"), name, text("pool_size")];
			answers[REGISTER] = Buffer.concat([...parts, Buffer.of(pool.bytes)]);
		}
		server.on("connection", (socket) => {
			lmcache.#sockets.add(socket);
			socket.on("error", () => {}); // the client may go at any time
			socket.write(GREETING);
			socket.write(READY);
			let input: Buffer = Buffer.alloc(0);
			let greeted = false;
			let frames: Buffer[] = [];
			socket.on("data", (bytes) => {
				input = Buffer.concat([input, bytes]);
				if (!greeted && input.length >= GREETING.length) {
					input = input.subarray(GREETING.length);
					greeted = true;
				}
				for (let frame = greeted && take(input); frame; frame = take(input)) {
					input = frame.rest;
					if (frame.command) {
						continue;
					}
					frames.push(frame.body);
					if (!frame.more) {
						const [uid, operation] = frames as [Buffer, Buffer];
						const id = operation[0] ?? 0;
						lmcache.asked.push(id);
						const answer = answers[id];
						if (id !== REGISTER || answer !== undefined) {
							socket.write(message([uid, operation, ...(answer === undefined ? [] : [answer])]));
						}
						frames = [];
					}
				}
			});
		});
		server.listen(0, "127.0.0.1");
		await once(server, "listening");
		return lmcache;
	}

	get url(): string {
		return `tcp://127.0.0.1:${(this.#server.address() as AddressInfo).port}`;
	}

	/** Lookups that it was asked for. */
	get lookups(): number {
		return this.asked.filter((id) => id === LOOKUP).length;
	}

	async [Symbol.asyncDispose](): Promise<void> {
		for (const socket of this.#sockets) {
			socket.destroy();
		}
		this.#server.close();
		await once(this.#server, "close");
	}
}

interface Frame {
	body: Buffer;
	more: boolean;
	command: boolean;
	rest: Buffer;
}

/** The first frame of `input`; undefined as long as it is not whole. */
function take(input: Buffer): Frame | undefined {
	const flags = input[0] ?? 0;
	const long = (flags & 2) !== 0;
	const head = long ? 9 : 2;
	if (input.length < head) {
		return undefined;
	}
	const length = long ? Number(input.readBigUInt64BE(1)) : (input[1] ?? 0);
	if (input.length < head + length) {
		return undefined;
	}
	return {
		body: input.subarray(head, head + length),
		more: (flags & 1) !== 0,
		command: (flags & 4) !== 0,
		rest: input.subarray(head + length),
	};
}

/** A short text as MessagePack has it. */
function text(value: string): Buffer {
	return Buffer.concat([Buffer.of(0xa0 + value.length), Buffer.from(value, "latin1")]);
}

function command(text: string): Buffer {
	return Buffer.concat([Buffer.of(4, text.length), Buffer.from(text, "latin1")]);
}

function message(frames: Buffer[]): Buffer {
	return Buffer.concat(
		frames.flatMap((body, at) => [Buffer.of(at + 1 < frames.length ? 1 : 0, body.length), body]),
	);
}
