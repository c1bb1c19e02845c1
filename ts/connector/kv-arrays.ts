import { checkAttached, checkInteger, invalid } from "../arguments.js";
import { wrap } from "../errors.js";
import type { PagedWorker as NativeWorker } from "../native-binding.js";
import { waitFor } from "../waiting.js";
import type { KvArray, KvCacheLayout, KvIpcHandle, KvPointer, LayerKv } from "./adapter.js";

/** A GPU, and the stream that its engine computes on. */
export interface Gpu {
	readonly device: number;
	readonly stream: bigint;
}

/** The GPU that a layout names; undefined for memory of the host. */
export function gpuOf({ device = "cpu", stream = 0n }: KvCacheLayout): Gpu | undefined {
	if (typeof stream !== "bigint" || BigInt.asUintN(64, stream) !== stream) {
		throw invalid("stream must be a CUstream's address, a bigint");
	}
	if (device === "cpu") {
		return undefined;
	}
	const found = /^cuda(?::(\d{1,4}))?$/.exec(device);
	if (found === null) {
		throw invalid(`device is ${JSON.stringify(device)}: it must be "cpu", "cuda" or "cuda:N"`);
	}
	return { device: Number(found[1] ?? 0), stream };
}

/** The arrays of a layer: K and V, or one with both where these are not `separate`. */
export function arraysOf(name: string, kv: LayerKv, separate: boolean): AnyArray[] {
	const arrays = ((Array.isArray(kv) ? kv : [kv]) as KvArray[]).map((array) =>
		arrayOf(name, array, separate),
	);
	const [whole] = arrays;
	if (separate && arrays.length === 1 && whole !== undefined) {
		const byteLength = whole.byteLength / 2;
		const second = Math.floor(byteLength);
		if (whole instanceof Uint8Array) {
			return [whole.subarray(0, second), whole.subarray(second)];
		}
		return "pointer" in whole
			? [0, second].map((at) => ({ pointer: whole.pointer + BigInt(at), byteLength }))
			: [0, second].map((at) => ({ ...whole, byteOffset: whole.byteOffset + at, byteLength }));
	}
	if (arrays.length !== (separate ? 2 : 1)) {
		throw invalid(`layer ${name} has ${arrays.length} arrays: it must have ${separate ? 2 : 1}`);
	}
	return arrays;
}

/** Memory of the host, by view or address, or of a GPU, by address or IPC handle. */
export type AnyArray = Uint8Array | KvPointer | (KvIpcHandle & { readonly byteOffset: number });

function arrayOf(name: string, array: KvArray, separate: boolean): AnyArray {
	if (ArrayBuffer.isView(array)) {
		const bytes = new Uint8Array(array.buffer, array.byteOffset, array.byteLength);
		checkAttached(`layer ${name}`, bytes);
		return bytes;
	}
	const {
		pointer,
		ipcHandle,
		byteOffset = 0,
		byteLength,
	} = (array ?? {}) as KvPointer & KvIpcHandle;
	const address = typeof pointer === "bigint" && BigInt.asUintN(64, pointer) === pointer;
	if (!address && ipcHandle instanceof Uint8Array && ipcHandle.length !== 64) {
		throw invalid(
			`the IPC handle of layer ${name} has ${ipcHandle.length} bytes: give the 64 of cuIpcGetMemHandle`,
		);
	}
	if (!address && !(ipcHandle instanceof Uint8Array)) {
		const two = separate ? ", or two of them" : "";
		throw invalid(
			`layer ${name} must be a typed array, { pointer, byteLength } or { ipcHandle, byteLength }${two}`,
		);
	}
	checkInteger(`byteLength of layer ${name}`, byteLength, 1, Number.MAX_SAFE_INTEGER);
	checkInteger(`byteOffset of layer ${name}`, byteOffset, 0, Number.MAX_SAFE_INTEGER);
	return address ? { pointer, byteLength } : { ipcHandle, byteOffset, byteLength };
}

/**
 * Refuses arrays that overlap, of which one load would write over another; with `takeTurns`, where their blocks may lie in
 * each other's gaps, only those that are the same.
 */
export function checkApart(
	arrays: readonly AnyArray[],
	takeTurns: boolean,
	layerOf: (at: number) => string,
): void {
	const places = new Map<unknown, { at: number; start: bigint; end: bigint }[]>();
	for (const [at, array] of arrays.entries()) {
		const [memory, first] =
			array instanceof Uint8Array
				? [array.buffer, BigInt(array.byteOffset)]
				: "pointer" in array
					? ["", array.pointer]
					: [Buffer.from(array.ipcHandle).toString("hex"), BigInt(array.byteOffset)];
		const among = places.get(memory) ?? [];
		among.push({ at, start: first, end: first + BigInt(array.byteLength) });
		places.set(memory, among);
	}
	for (const among of places.values()) {
		among.sort((a, b) => (a.start < b.start ? -1 : Number(a.start > b.start)));
		for (const [i, place] of among.entries()) {
			const before = among[i - 1];
			if (before === undefined || before.end <= place.start) {
				continue;
			}
			const [one, other] = [layerOf(before.at), layerOf(place.at)];
			if (before.start === place.start && one !== other) {
				throw invalid(
					`layer ${one} and layer ${other} have the same memory: name it once; a layer that uses another's KV has none ` +
						"to be stored",
				);
			}
			if (before.start === place.start || !takeTurns) {
				throw invalid(
					`the arrays of layer ${one} and of layer ${other} overlap: give each memory of its own, or the layout's ` +
						"blockStride where their blocks take turns",
				);
			}
		}
	}
}

/** Registers memory that copies may run to by themselves; returns the other, which each call must be given. */
export async function registerArrays(
	worker: NativeWorker,
	arrays: readonly AnyArray[],
	gpu: Gpu | undefined,
): Promise<Uint8Array[] | undefined> {
	const views = arrays.filter((array) => array instanceof Uint8Array);
	const pointers = arrays.filter((array) => "pointer" in array);
	const handles = arrays.filter((array) => "ipcHandle" in array);
	if (Math.max(views.length, pointers.length, handles.length) < arrays.length) {
		throw invalid("KV memory is given in typed arrays, by address or by IPC handle: choose one");
	}
	if (gpu === undefined ? handles.length > 0 : views.length > 0) {
		throw invalid(
			gpu === undefined
				? 'an IPC handle is of a GPU\'s memory: give the layout\'s device, "cuda" or "cuda:N"'
				: "a GPU's memory is given by address or by IPC handle, not in typed arrays",
		);
	}
	const addresses = BigUint64Array.from(pointers, ({ pointer }) => pointer);
	if (gpu !== undefined) {
		const ipc = Buffer.concat(handles.map(({ ipcHandle }) => ipcHandle));
		const offsets = BigUint64Array.from(handles, ({ byteOffset }) => BigInt(byteOffset));
		await waitFor(
			() =>
				handles.length > 0
					? worker.registerCudaIpc(gpu.device, gpu.stream, ipc, offsets)
					: worker.registerCuda(gpu.device, gpu.stream, addresses),
			undefined,
		);
		return undefined;
	}
	if (pointers.length > 0) {
		wrap(() => worker.registerHost(addresses));
		return undefined;
	}
	if (views.every(({ buffer }) => buffer instanceof SharedArrayBuffer)) {
		wrap(() => worker.registerShared(views));
		return undefined;
	}
	return views;
}
