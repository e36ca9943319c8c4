//! Sits between a program and a broker and sees every packet that passes.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

/// What to do with a packet.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Verdict {
    /// Let it pass.
    Pass,
    /// Let these bytes pass in its place.
    Replace(Vec<u8>),
    /// Cut the connection, both ways, before it.
    Cut,
}

/// Who sent a packet, and the packet, fixed header included.
type Judge = dyn FnMut(bool, &[u8]) -> Verdict + Send;

/// A listener that passes each connection on to a broker, packet by packet.
#[derive(Debug)]
pub struct Proxy {
    /// Where it listens.
    pub address: SocketAddr,
}

impl Proxy {
    /// Starts a proxy before `target`. `judge` gets every packet: `true` if the client sent it.
    #[must_use]
    pub fn start(target: SocketAddr, judge: impl FnMut(bool, &[u8]) -> Verdict + Send + 'static) -> Proxy {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let judge: Arc<Mutex<Judge>> = Arc::new(Mutex::new(judge));
        thread::spawn(move || {
            for client in listener.incoming() {
                let (Ok(client), Ok(broker)) = (client, TcpStream::connect(target)) else { return };
                client.set_nodelay(true).unwrap();
                broker.set_nodelay(true).unwrap();
                let (client2, broker2) = (client.try_clone().unwrap(), broker.try_clone().unwrap());
                let (up, down) = (judge.clone(), judge.clone());
                thread::spawn(move || pass(client, broker, true, &up));
                thread::spawn(move || pass(broker2, client2, false, &down));
            }
        });
        Proxy { address }
    }

    /// The proxy's URL.
    #[must_use]
    pub fn url(&self) -> String {
        format!("mqtt://{}", self.address)
    }
}

fn pass(mut from: TcpStream, mut to: TcpStream, client: bool, judge: &Mutex<Judge>) {
    while let Some(packet) = read_packet(&mut from) {
        let verdict = judge.lock().unwrap()(client, &packet);
        let sent = match verdict {
            Verdict::Pass => to.write_all(&packet),
            Verdict::Replace(bytes) => to.write_all(&bytes),
            Verdict::Cut => break,
        };
        if sent.is_err() {
            break;
        }
    }
    from.shutdown(Shutdown::Both).ok();
    to.shutdown(Shutdown::Both).ok();
}

fn read_packet(from: &mut TcpStream) -> Option<Vec<u8>> {
    let mut packet = vec![0];
    from.read_exact(&mut packet).ok()?;
    let (mut length, mut shift) = (0, 0);
    loop {
        let mut byte = [0];
        from.read_exact(&mut byte).ok()?;
        packet.push(byte[0]);
        length |= usize::from(byte[0] & 0x7f) << shift;
        shift += 7;
        if byte[0] & 0x80 == 0 {
            break;
        }
    }
    let header = packet.len();
    packet.resize(header + length, 0);
    from.read_exact(&mut packet[header..]).ok()?;
    Some(packet)
}
