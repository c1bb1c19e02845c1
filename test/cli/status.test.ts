// The built program on a terminal, which Python makes.

import { spawn } from "node:child_process";
import { once } from "node:events";
import { fileURLToPath } from "node:url";
import { describe, expect, it } from "vitest";
import { Client, PrefixCache, Server } from "../../ts/index.js";

const main = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));
/** Lines of stdin are what is typed; "size COLUMNS ROWS" changes the terminal. */
const TERMINAL = `
import fcntl, os, pty, select, struct, sys, termios
pid, fd = pty.fork()
if pid == 0:
    os.execv(sys.argv[1], sys.argv[1:])
def size(columns, rows):
    fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
size(100, 30)
while True:
    ready, _, _ = select.select([fd, 0], [], [])
    if 0 in ready:
        words = os.read(0, 100).decode().split()
        if words[:1] == ["size"]:
            size(int(words[1]), int(words[2]))
        elif words[:1] == ["interrupt"]:
            os.write(fd, b"\\x03")
    if fd in ready:
        try:
            data = os.read(fd, 65536)
        except OSError:
            break
        if not data:
            break
        os.write(1, data)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
`;

describe.skipIf(process.platform !== "linux")("kvferry status on a terminal", () => {
	it("is live, follows the terminal's size, and leaves it as it was", async () => {
		await using server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: 16 });
		const url = `tcp://${server.address}`;
		const child = spawn(
			"python3",
			["-c", TERMINAL, process.execPath, main, "status", "--url", url],
			{
				stdio: ["pipe", "pipe", "inherit"],
			},
		);
		let screen = "";
		child.stdout.setEncoding("utf8").on("data", (text: string) => {
			screen += text.replaceAll("\x1b", "ESC");
		});
		const exit = once(child, "exit");
		const shows = (words: RegExp) => expect.poll(() => screen, { timeout: 20_000 }).toMatch(words);
		await shows(/hit ratio +– of the last minute/);
		expect(screen).toContain("ESC[?1049h");

		await using client = await Client.connect({ url });
		await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 64 });
		await cache.store(new Uint32Array(64), () => new Uint8Array(64));
		await (await cache.lookup(new Uint32Array(64))).close();
		await shows(/hit ratio +\d+\.\d % of the last minute[^\n]*64 of \d+ tokens/);

		screen = "";
		child.stdin.write("size 20 10\n");
		await shows(/ESC\[Hkvferry .{1,12}ESC\[K\r\n/);
		expect(screen).not.toContain("Ctrl-C ends");

		screen = "";
		child.stdin.write("size 0 0\n");
		await shows(/Ctrl-C ends/); // as on one of 80 columns and 24 rows

		child.stdin.write("interrupt\n");
		expect(await exit).toEqual([0, null]);
		expect(screen.endsWith("ESC[?25hESC[?1049l")).toBe(true);
	}, 60_000);
});
