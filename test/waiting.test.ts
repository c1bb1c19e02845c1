import { getEventListeners } from "node:events";
import { describe, expect, it, vi } from "vitest";
import { waitFor } from "../ts/waiting.js";

describe("a wait with a signal", () => {
	it("gives what the work gives, and leaves no listener behind", async () => {
		const { signal } = new AbortController();
		const undo = vi.fn();
		expect(await waitFor(async () => 7, signal, undo)).toBe(7);
		const failing = waitFor(() => Promise.reject(new Error("TIMEOUT: late")), signal, undo);
		await expect(failing).rejects.toMatchObject({ code: "TIMEOUT" });
		expect(getEventListeners(signal, "abort")).toEqual([]);
		expect(undo).not.toHaveBeenCalled();
	});

	it("does not begin when it was aborted before", async () => {
		const work = vi.fn();
		const reason = new Error("not needed");
		await expect(waitFor(work, AbortSignal.abort(reason), () => {})).rejects.toMatchObject({
			code: "ABORTED",
			cause: reason,
		});
		expect(work).not.toHaveBeenCalled();
	});

	it("gives back what comes after the abort, even when giving back fails", async () => {
		const unhandled = vi.fn();
		process.on("unhandledRejection", unhandled);
		try {
			const fail = () => {
				throw new Error("CLOSED: gone");
			};
			for (const undo of [vi.fn(), vi.fn(fail), vi.fn(async () => fail())]) {
				const aborting = new AbortController();
				let end: (value: string) => void = () => {};
				const waiting = waitFor(
					() => new Promise<string>((resolve) => (end = resolve)),
					aborting.signal,
					undo,
				);
				aborting.abort();
				await expect(waiting).rejects.toMatchObject({ code: "ABORTED" });
				expect(getEventListeners(aborting.signal, "abort")).toEqual([]);
				end("late");
				await vi.waitFor(() => expect(undo).toHaveBeenCalledExactlyOnceWith("late"));
			}
			await new Promise(setImmediate);
			expect(unhandled).not.toHaveBeenCalled();
		} finally {
			process.off("unhandledRejection", unhandled);
		}
	});

	it("swallows a failure that comes after the abort", async () => {
		const unhandled = vi.fn();
		process.on("unhandledRejection", unhandled);
		try {
			const aborting = new AbortController();
			let fail: (error: Error) => void = () => {};
			const work = () => new Promise<never>((_, reject) => (fail = reject));
			const waiting = waitFor(work, aborting.signal, () => {});
			aborting.abort();
			await expect(waiting).rejects.toMatchObject({ code: "ABORTED" });
			fail(new Error("TIMEOUT: late"));
			await new Promise(setImmediate);
			expect(unhandled).not.toHaveBeenCalled();
		} finally {
			process.off("unhandledRejection", unhandled);
		}
	});

	it("refuses what is no signal before it begins", async () => {
		const work = vi.fn();
		for (const wrong of [new AbortController(), null, 1]) {
			await expect(waitFor(work, wrong as never, () => {})).rejects.toMatchObject({
				code: "INVALID_ARGUMENT",
			});
		}
		expect(work).not.toHaveBeenCalled();
	});
});
