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

    fn handle(&mut self, order: &str) -> IpcHandle {
        let answer = self.ask(order);
        let bytes: Vec<u8> =
            (0..64).map(|i| u8::from_str_radix(&answer[2 * i..2 * i + 2], 16).unwrap()).collect();
        IpcHandle(bytes.try_into().unwrap())
    }

    fn end(mut self) {
        drop(self.orders);
        self.child.wait().unwrap();
    }
}

const INTERPROCESS: u32 = 2 | 4;

fn hex(handle: IpcHandle) -> String {
    handle.0.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Allocates 64 bytes of 5, makes an event, and does what it is told.
fn export() {
    let fake = Fake::start();
    let memory = fake.alloc(64);
    let (stream, mut event) = (fake.stream(), 0);
    assert_eq!(fake.cuEventCreate(&mut event, INTERPROCESS), 0);
    assert_eq!(fake.cuMemsetD8_v2(memory, 5, 64), 0);
    assert_eq!(fake.cuCtxSynchronize(), 0);
    for order in std::io::stdin().lines() {
        let answer = match order.unwrap().as_str() {
            "export" => {
                let mut handle = IpcHandle([0; 64]);
                assert_eq!(fake.cuIpcGetMemHandle(&mut handle, memory + 10), 0);
                hex(handle)
            }
            "event" => {
                let mut handle = IpcHandle([0; 64]);
                assert_eq!(fake.cuIpcGetEventHandle(&mut handle, event), 0);
                hex(handle)
            }
            "record" => fake.cuEventRecord(event, stream).to_string(),
            "query" => fake.cuEventQuery(event).to_string(),
            "looks" => fake.fakeCudaEventLooks(event).to_string(),
            order @ ("hold" | "let go") => {
                fake.fakeCudaControlHold((order == "hold").into());
                String::new()
            }
            "synchronize" => fake.cuEventSynchronize(event).to_string(),
            "destroy" => fake.cuEventDestroy_v2(event).to_string(),
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
    let handle = exporter.handle("export");
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
    let memory = open(&fake, exporter.handle("export"));
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
    let memory = open(&fake, exporter.handle("export"));
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
    let imported = open(&fake, exporter.handle("export"));
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

fn open_event(fake: &Fake, exporter: &mut Exporter) -> u64 {
    let mut event = 0;
    assert_eq!(fake.cuIpcOpenEventHandle(&mut event, exporter.handle("event")), 0);
    event
}

#[test]
fn an_event_tells_other_processes_when_its_stream_has_come_so_far() {
    if role().is_some() {
        return export();
    }
    let test = "ipc::an_event_tells_other_processes_when_its_stream_has_come_so_far";
    let mut exporter = Exporter::start(test);
    let fake = Fake::start();
    let (event, stream, memory) = (open_event(&fake, &mut exporter), fake.stream(), fake.alloc(4));
    assert_eq!(fake.cuEventQuery(event), 0); // never recorded
    exporter.ask("hold");
    assert_eq!(exporter.ask("record"), "0");
    assert_eq!(fake.cuEventQuery(event), NOT_READY);
    assert_eq!(exporter.ask("looks"), "2");
    assert_eq!(fake.cuStreamWaitEvent(stream, event, 0), 0);
    assert_eq!(fake.cuMemsetD8Async(memory, 1, 4, stream), 0);
    assert_eq!(fake.cuStreamQuery(stream), NOT_READY);
    exporter.ask("let go");
    assert_eq!(fake.cuEventSynchronize(event), 0);
    assert_eq!(fake.cuEventQuery(event), 0);
    assert_eq!(fake.cuStreamSynchronize(stream), 0);
    assert_eq!(exporter.ask("query"), "0");
    // The other way round.
    fake.fakeCudaControlHold(1);
    assert_eq!(fake.cuEventRecord(event, stream), 0);
    assert_eq!(exporter.ask("query"), NOT_READY.to_string());
    fake.fakeCudaControlHold(0);
    assert_eq!(exporter.ask("synchronize"), "0");
    assert_eq!(fake.cuEventDestroy_v2(event), 0);
    exporter.end();
    fake.assert_clean();
}

#[test]
fn events_of_other_processes_are_checked() {
    if role().is_some() {
        return export();
    }
    let mut exporter = Exporter::start("ipc::events_of_other_processes_are_checked");
    let fake = Fake::start();
    let (mut handle, mut opened, mut own) = (IpcHandle([0; 64]), 0, 0);
    assert_eq!(fake.cuIpcOpenEventHandle(&mut opened, handle), INVALID_HANDLE);
    fake.assert_caught("no event handle");
    assert_eq!(fake.cuIpcOpenEventHandle(&mut opened, exporter.handle("export")), INVALID_HANDLE);
    fake.assert_caught("no event handle");
    assert_eq!(fake.cuIpcGetEventHandle(&mut handle, fake.event()), INVALID_HANDLE);
    fake.assert_caught("without CU_EVENT_INTERPROCESS");
    assert_eq!(fake.cuEventCreate(&mut own, INTERPROCESS), 0);
    assert_eq!(fake.cuIpcGetEventHandle(&mut handle, own), 0);
    assert_eq!(fake.cuIpcOpenEventHandle(&mut opened, handle), INVALID_CONTEXT);
    fake.assert_caught("process that exported it");
    let event = open_event(&fake, &mut exporter);
    assert_eq!(fake.cuIpcGetEventHandle(&mut handle, event), INVALID_HANDLE);
    fake.assert_caught("cannot be handed on");
    let mut elapsed = 0.0;
    assert_eq!(fake.cuEventElapsedTime(&mut elapsed, event, event), INVALID_HANDLE);
    fake.assert_caught("without timing");
    let gone = exporter.handle("event");
    assert_eq!(exporter.ask("destroy"), "0");
    for code in [fake.cuEventQuery(event), fake.cuStreamWaitEvent(fake.stream(), event, 0)] {
        assert_eq!(code, INVALID_HANDLE);
        assert!(fake.violations().pop().unwrap().contains("has destroyed the event"));
    }
    fake.fakeCudaControlReset();
    assert_eq!(fake.cuEventDestroy_v2(event), 0);
    assert_eq!(fake.cuIpcOpenEventHandle(&mut opened, gone), 205);
    exporter.end();
    fake.assert_clean();
}

#[test]
fn what_a_process_that_has_ended_had_recorded_is_never_done() {
    if role().is_some() {
        return export();
    }
    let test = "ipc::what_a_process_that_has_ended_had_recorded_is_never_done";
    let mut exporter = Exporter::start(test);
    let fake = Fake::start();
    let event = open_event(&fake, &mut exporter);
    exporter.ask("hold");
    assert_eq!(exporter.ask("record"), "0");
    exporter.end();
    assert_eq!(fake.cuEventQuery(event), NOT_READY);
    assert_eq!(fake.cuEventDestroy_v2(event), 0);
    fake.assert_clean();
}
