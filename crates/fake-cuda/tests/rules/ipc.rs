//! Two processes: this program runs itself again, and they talk by lines.

use crate::support::*;
use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Stdio};

/// The exporting process, which does one thing for each line it is sent.
struct Exporter {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Exporter {
    fn start(test: &str) -> Self {
        let mut command = child(test, "exporter", &[]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let orders = child.stdin.take().unwrap();
        let answers = BufReader::new(child.stdout.take().unwrap());
        Self { child, orders, answers }
    }

    /// The answer, which the test harness's own lines may precede.
    fn ask(&mut self, order: &str) -> String {
        writeln!(self.orders, "{order}").unwrap();
        loop {
            let mut line = String::new();
            assert!(self.answers.read_line(&mut line).unwrap() > 0, "the exporter ended");
            if let Some((_, answer)) = line.trim().split_once("answer:") {
                return answer.trim().to_owned();
            }
        }
    }

    fn handle(&mut self) -> IpcHandle {
        let answer = self.ask("export");
        let bytes: Vec<u8> =
            (0..64).map(|i| u8::from_str_radix(&answer[2 * i..2 * i + 2], 16).unwrap()).collect();
        IpcHandle(bytes.try_into().unwrap())
    }

    fn end(mut self) {
        drop(self.orders);
        self.child.wait().unwrap();
    }
}

/// Allocates 64 bytes of 5 and does what it is told.
fn export() {
    let fake = Fake::start();
    let memory = fake.alloc(64);
    assert_eq!(fake.cuMemsetD8_v2(memory, 5, 64), 0);
    assert_eq!(fake.cuCtxSynchronize(), 0);
    for order in std::io::stdin().lines() {
        let answer = match order.unwrap().as_str() {
            "export" => {
                let mut handle = IpcHandle([0; 64]);
                assert_eq!(fake.cuIpcGetMemHandle(&mut handle, memory + 10), 0);
                handle.0.iter().map(|byte| format!("{byte:02x}")).collect()
            }
            "byte" => {
                let mut byte = [0];
                assert_eq!(fake.cuMemcpyDtoH_v2(byte.as_mut_ptr(), memory + 3, 1), 0);
                byte[0].to_string()
            }
            "free" => {
                assert_eq!(fake.cuMemFree_v2(memory), 0);
                fake.violations().join("; ")
            }
            order => unreachable!("{order}"),
        };
        let mut out = std::io::stdout();
        writeln!(out, "\nanswer: {answer}").unwrap();
    }
}

fn open(fake: &Fake, handle: IpcHandle) -> u64 {
    let mut memory = 0;
    assert_eq!(fake.cuIpcOpenMemHandle_v2(&mut memory, handle, 1), 0);
    memory
}

#[test]
fn two_processes_have_the_same_bytes() {
    if role().is_some() {
        return export();
    }
    let mut exporter = Exporter::start("ipc::two_processes_have_the_same_bytes");
    let fake = Fake::start();
    let handle = exporter.handle();
    let memory = open(&fake, handle);
    let mut back = [0; 64];
    assert_eq!(fake.cuMemcpyDtoH_v2(back.as_mut_ptr(), memory, 64), 0);
    assert_eq!(back, [5; 64]);
    assert_eq!(fake.cuMemsetD8_v2(memory + 3, 77, 1), 0);
    assert_eq!(fake.cuCtxSynchronize(), 0);
    assert_eq!(exporter.ask("byte"), "77");
    let mut again = 0;
    assert_eq!(fake.cuIpcOpenMemHandle_v2(&mut again, handle, 1), 0);
    assert_eq!(again, memory);
    assert_eq!(fake.cuIpcCloseMemHandle(memory), 0);
    assert_eq!(fake.cuMemsetD8_v2(memory, 1, 1), 0); // opened twice, closed once
    assert_eq!(fake.cuCtxSynchronize(), 0);
    assert_eq!(fake.cuIpcCloseMemHandle(memory), 0);
    assert_eq!(exporter.ask("free"), "");
    fake.assert_clean();
    assert_eq!(fake.cuMemsetD8_v2(memory, 1, 1), INVALID_VALUE);
    fake.assert_caught("was freed or closed");
    assert_eq!(fake.cuIpcCloseMemHandle(memory), INVALID_VALUE);
    fake.assert_caught("was freed or closed");
    assert_eq!(fake.cuIpcOpenMemHandle_v2(&mut again, handle, 1), 205); // freed by now
    exporter.end();
}

#[test]
fn memory_is_not_freed_while_another_process_has_it() {
    if role().is_some() {
        return export();
    }
    let mut exporter = Exporter::start("ipc::memory_is_not_freed_while_another_process_has_it");
    let fake = Fake::start();
    let memory = open(&fake, exporter.handle());
    assert!(exporter.ask("free").contains("has it open"));
    assert_eq!(fake.cuMemsetD8_v2(memory, 1, 1), INVALID_VALUE);
    fake.assert_caught("has freed the memory that is open here");
    exporter.end();
}

#[test]
fn memory_of_a_process_that_has_ended_is_gone() {
    if role().is_some() {
        return export();
    }
    let mut exporter = Exporter::start("ipc::memory_of_a_process_that_has_ended_is_gone");
    let fake = Fake::start();
    let memory = open(&fake, exporter.handle());
    exporter.end();
    assert_eq!(fake.cuMemsetD8_v2(memory, 1, 1), INVALID_VALUE);
    fake.assert_caught("has ended");
    assert_eq!(fake.cuIpcCloseMemHandle(memory), 0);
    fake.assert_clean();
}

#[test]
fn handles_are_checked() {
    if role().is_some() {
        return export();
    }
    let mut exporter = Exporter::start("ipc::handles_are_checked");
    let fake = Fake::start();
    let own = fake.alloc(16);
    let (mut handle, mut memory) = (IpcHandle([0; 64]), 0);
    assert_eq!(fake.cuIpcOpenMemHandle_v2(&mut memory, handle, 1), INVALID_HANDLE);
    fake.assert_caught("no memory handle");
    assert_eq!(fake.cuIpcGetMemHandle(&mut handle, own), 0);
    assert_eq!(fake.cuIpcOpenMemHandle_v2(&mut memory, handle, 1), INVALID_CONTEXT);
    fake.assert_caught("process that exported it");
    assert_eq!(fake.cuIpcOpenMemHandle_v2(&mut memory, handle, 0), INVALID_VALUE);
    fake.assert_caught("LAZY_ENABLE_PEER_ACCESS");
    let imported = open(&fake, exporter.handle());
    assert_eq!(fake.cuIpcGetMemHandle(&mut handle, imported), INVALID_VALUE);
    fake.assert_caught("cannot be handed on");
    assert_eq!(fake.cuMemFree_v2(imported), INVALID_VALUE);
    fake.assert_caught("closed, not freed");
    assert_eq!(fake.cuIpcCloseMemHandle(own), INVALID_VALUE);
    fake.assert_caught("was not opened");
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuMemsetD8_v2(imported, 1, 1), 0);
    assert_eq!(fake.cuIpcCloseMemHandle(imported), 0);
    fake.assert_caught("before the host has seen the end of cuMemsetD8_v2");
    exporter.end();
}
