// A small engine with paged KV memory, and the steps that it takes.

import type {
	ConnectorMetadata,
	KvCacheLayout,
	LayerKv,
	LoadStoreOp,
	WorkerConnector,
} from "../../ts/index.js";

export const CHUNK = 16;
export const BLOCK = 4;
export const BLOCKS = 16;
const LAYERS = 2;

export const range = (from: number, to: number): number[] =>
	Array.from({ length: to - from }, (_, i) => from + i);

export type Shape = Required<Pick<KvCacheLayout, "planes" | "kvLayout">>;

/** A worker with a small KV pool, whose elements can be read and written by what they mean. */
export class Engine {
	readonly kv: Record<string, Uint16Array> = {};
	readonly layout: KvCacheLayout;
	readonly heads: number;
	readonly halves: number;

	/**
	 * @param interleaved K and V of each block lie side by side, in one array `[blocks, 2, …]`.
	 */
	constructor(
		shape: Shape,
		memory: "array" | "shared" = "array",
		private readonly interleaved = false,
	) {
		this.heads = shape.planes === "latent" ? 1 : 3;
		this.halves = shape.planes === "latent" ? 1 : 2;
		this.layout = {
			...shape,
			numBlocks: BLOCKS,
			blockSize: BLOCK,
			numKvHeads: this.heads,
			headSize: 5,
			dtype: "float16",
			...(interleaved ? { blockStride: 2 * this.#blockBytes } : {}),
		};
		for (let layer = 0; layer < LAYERS; layer++) {
			const bytes = BLOCKS * BLOCK * this.heads * 5 * this.halves * 2;
			const buffer = memory === "array" ? new ArrayBuffer(bytes) : new SharedArrayBuffer(bytes);
			this.kv[`layer.${layer}`] = new Uint16Array(buffer);
		}
	}

	get #blockBytes(): number {
		return BLOCK * this.heads * 5 * 2;
	}

	/** What to register. */
	get caches(): Record<string, LayerKv> {
		const halves = ({ buffer, byteLength }: Uint16Array): LayerKv => {
			const [at, length] = [this.#blockBytes, byteLength - this.#blockBytes];
			return [new Uint8Array(buffer, 0, length), new Uint8Array(buffer, at, length)];
		};
		const layers = Object.entries(this.kv).map(([name, kv]) => [
			name,
			this.interleaved ? halves(kv) : kv,
		]);
		return Object.fromEntries(layers);
	}

	/** Where an element is in its layer's array, spelt out from the shapes. */
	#at(block: number, token: number, half: number, head: number, element: number): number {
		const { heads } = this;
		const size = this.layout.planes === "fused" ? 10 : 5;
		const inHead = this.layout.planes === "fused" ? half * 5 + element : element;
		const separate = this.layout.planes === "separate" ? half : 0;
		const plane = separate * (this.interleaved ? 1 : BLOCKS) * BLOCK * heads * 5;
		const gap = this.interleaved ? block * BLOCK * heads * 5 : 0;
		const row =
			this.layout.kvLayout === "NHD"
				? (block * BLOCK + token) * heads + head
				: (block * heads + head) * BLOCK + token;
		return plane + gap + row * size + inHead;
	}

	#each(visit: (layer: string, half: number, head: number, element: number) => void): void {
		for (const layer of Object.keys(this.kv)) {
			for (let half = 0; half < this.halves; half++) {
				for (let head = 0; head < this.heads; head++) {
					for (let element = 0; element < 5; element++) {
						visit(layer, half, head, element);
					}
				}
			}
		}
	}

	/** Computes the KV of a token that lies in a block: the same in every engine. */
	compute(position: number, block: number): void {
		this.#each((layer, half, head, element) => {
			const at = this.#at(block, position % BLOCK, half, head, element);
			(this.kv[layer] as Uint16Array)[at] = this.value(position, layer, half, head, element);
		});
	}

	/** Whether a block's place for a token holds just its KV. */
	holds(position: number, block: number): boolean {
		let all = true;
		this.#each((layer, half, head, element) => {
			const at = this.#at(block, position % BLOCK, half, head, element);
			all &&= this.kv[layer]?.[at] === this.value(position, layer, half, head, element);
		});
		return all;
	}

	value(position: number, layer: string, half: number, head: number, element: number): number {
		return (
			1 +
			((position * 31 + Number(layer.at(-1)) * 7919 + half * 1009 + head * 101 + element * 11) %
				65_000)
		);
	}
}

export function fill(engine: Engine, blocks: readonly number[]): void {
	for (const position of range(0, blocks.length * BLOCK)) {
		engine.compute(position, blocks[Math.floor(position / BLOCK)] as number);
	}
}

export function held(engine: Engine, blocks: readonly number[]): number[] {
	return range(0, blocks.length * BLOCK).filter((position) =>
		engine.holds(position, blocks[Math.floor(position / BLOCK)] as number),
	);
}

export const SHAPES: Shape[] = (["separate", "fused", "latent"] as const).flatMap((planes) =>
	(["NHD", "HND"] as const).map((kvLayout) => ({ planes, kvLayout })),
);

export const TOKENS = range(100, 100 + 3 * CHUNK);

export function step(
	direction: "RETRIEVE" | "STORE",
	blocks: number[],
	rest: { skip?: number; start?: number; requestId?: string; salt?: string; sync?: boolean } = {},
): ConnectorMetadata {
	const { skip = 0, start = 0, requestId = "r", salt = "", sync = false } = rest;
	const end = start + blocks.length * BLOCK;
	const op: LoadStoreOp = {
		tokenIds: TOKENS,
		start,
		end,
		blockIds: [blocks],
		skipFirstNTokens: skip,
	};
	return { loadAsync: !sync, requests: [{ requestId, direction, op, cacheSalt: salt }] };
}

export async function run(connector: WorkerConnector, metadata: ConnectorMetadata): Promise<void> {
	connector.bindConnectorMetadata(metadata);
	connector.startLoadKv();
	await connector.waitForLayerLoad();
	await connector.waitForSave();
}

/** Awaits the end of a load. */
export async function received(connector: WorkerConnector, requestId: string): Promise<void> {
	for (;;) {
		const [, recving] = connector.getFinished(new Set());
		if (recving.has(requestId)) {
			return;
		}
		await new Promise((resolve) => setImmediate(resolve));
	}
}

/** Awaits the report that an ended request's blocks are free, which includes its stores. */
export async function sent(connector: WorkerConnector, requestId: string): Promise<void> {
	let ended = new Set([requestId]);
	for (;;) {
		const [sending] = connector.getFinished(ended);
		if (sending.has(requestId)) {
			return;
		}
		ended = new Set();
		await new Promise((resolve) => setImmediate(resolve));
	}
}
